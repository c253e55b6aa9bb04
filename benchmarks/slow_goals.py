"""What was asked of `slow_network.py`'s rows, what came out, and whether that was met; only of what was run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.slow_rows import Row, over
from benchmarks.slow_settings import ALL_TAKE_PART, CITIES, DENSE, FAST, HEADLINE, SETTINGS, SLOW_MOTION

LEAST_OVER_TORCH = {"grouped": 10.0, "alternating": 13.0}
"""At 8 Mbit/s."""
MOST_OVER_FAST = {"8": 1.5, "20": 1.25, "100": 1.1}
LEAST_OVER_UNIFORM = 1.5
MOST_OVER_DENSE_ON_FAST = 1.05
"""As much as two runs of the same plan differ."""
MOST_LOSS = 1.01
MOST_OVER_BOUND = 1.15

LossOf = Callable[[Row], float | None]


@dataclass(frozen=True)
class Goal:
    """The median of `values`, one for each round, is to be at least, or at most, `bound`."""

    what: str
    values: tuple[float, ...]
    bound: float
    at_least: bool
    of: Row | None = None
    """The row of ours that is judged."""

    @property
    def title(self) -> str:
        """What is judged of which plan where."""
        if self.of is None:
            return self.what
        plan = self.of.name.removeprefix("ours: ")
        return f"{self.of.model}, {SETTINGS[self.of.setting].title}, {plan}: {self.what}"

    @property
    def value(self) -> float:
        return median(self.values)

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def goals(rows: Sequence[Row], loss_of: LossOf) -> Iterator[Goal]:
    """For every model and setting, left free to leave workers out and not; `loss_of` a row is that after 300 steps, if known."""
    for headline in (HEADLINE, ALL_TAKE_PART):
        ours = [row for row in rows if row.name == f"ours: {headline.name}"]
        for best in ours:
            fast = [row for row in ours if row.setting == FAST and row.model == best.model]
            mine = [row for row in rows if (row.setting, row.model) == (best.setting, best.model)]
            for goal in (*_speed(best, mine, fast), *_loss(best, mine, loss_of)):
                yield replace(goal, of=best)


def _speed(best: Row, mine: Sequence[Row], fast: Sequence[Row]) -> Iterator[Goal]:
    yardstick = best.model == "gpt"
    for order, bound in LEAST_OVER_TORCH.items():
        for other in mine:
            if yardstick and best.setting == "8" and other.name == f"torch, {order}":
                yield Goal(f"torch, {order}, over ours", over(other, best), bound, at_least=True)
    if yardstick and best.setting in MOST_OVER_FAST:
        for other in fast:
            yield Goal("over our own fast network", over(best, other), MOST_OVER_FAST[best.setting], at_least=False)
    uniform = [other for other in mine if other.uniform]
    if uniform and best.setting != FAST:
        yield _over_uniform("our best uniform baseline over ours", uniform, best)
    dense = _dense(mine)
    if dense is not None and best.setting == FAST:
        yield Goal("auto over dense", over(best, dense), MOST_OVER_DENSE_ON_FAST, at_least=False)
    if best.over_bound is not None and best.setting in CITIES + SLOW_MOTION:
        yield Goal("step over its slowest stage or link", (best.over_bound,), MOST_OVER_BOUND, at_least=False)


def _over_uniform(what: str, uniform: Sequence[Row], best: Row) -> Goal:
    quickest = min(uniform, key=lambda row: row.seconds)
    return Goal(what, over(quickest, best), LEAST_OVER_UNIFORM, at_least=True)


def _loss(best: Row, mine: Sequence[Row], loss_of: LossOf) -> Iterator[Goal]:
    dense = _dense(mine)
    wanted = loss_of(dense) if dense is not None else None
    if wanted is None:
        return
    reached = loss_of(best)
    if reached is not None:
        yield Goal("loss after 300 steps over dense", (reached / wanted,), MOST_LOSS, at_least=False)
    as_good = [row for row in mine if row.uniform and (loss_of(row) or float("inf")) <= MOST_LOSS * wanted]
    if as_good and best.setting != FAST:
        yield _over_uniform("our best uniform baseline that is within 1% of dense, over ours", as_good, best)


def _dense(mine: Sequence[Row]) -> Row | None:
    return next((row for row in mine if row.name == f"ours: {DENSE.name}"), None)
