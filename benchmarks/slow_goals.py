"""What was asked of `slow_network.py`'s rows, what came out, and whether that was met; only of what was run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.slow_rows import Row
from benchmarks.slow_settings import DENSE, FAST, HEADLINE, SETTINGS

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
    """`value` is to be at least, or at most, `bound`."""

    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def goals(rows: Sequence[Row], loss_of: LossOf) -> Iterator[Goal]:
    """For every model and setting; `loss_of` a row is that after 300 steps, if known."""
    headlines = [row for row in rows if row.name == f"ours: {HEADLINE.name}"]
    for best in headlines:
        fast = [row for row in headlines if row.setting == FAST and row.model == best.model]
        mine = [row for row in rows if (row.setting, row.model) == (best.setting, best.model)]
        title = f"{best.model}, {SETTINGS[best.setting].title}"
        for goal in (*_speed(best, mine, fast), *_loss(best, mine, loss_of)):
            yield Goal(f"{title}: {goal.what}", goal.value, goal.bound, goal.at_least)


def _speed(best: Row, mine: Sequence[Row], fast: Sequence[Row]) -> Iterator[Goal]:
    yardstick = best.model == "gpt"
    for order, bound in LEAST_OVER_TORCH.items():
        for other in mine:
            if yardstick and best.setting == "8" and other.name == f"torch, {order}":
                yield Goal(f"torch, {order}, over ours", other.seconds / best.seconds, bound, at_least=True)
    if yardstick and best.setting in MOST_OVER_FAST:
        for other in fast:
            bound = MOST_OVER_FAST[best.setting]
            yield Goal("over our own fast network", best.seconds / other.seconds, bound, at_least=False)
    uniform = [other.seconds for other in mine if other.uniform]
    if uniform and best.setting != FAST:
        over = min(uniform) / best.seconds
        yield Goal("our best uniform baseline over ours", over, LEAST_OVER_UNIFORM, at_least=True)
    dense = _dense(mine)
    if dense is not None and best.setting == FAST:
        over = best.seconds / dense.seconds
        yield Goal("auto over dense", over, MOST_OVER_DENSE_ON_FAST, at_least=False)
    if best.over_bound is not None and best.setting in MOST_OVER_FAST:
        yield Goal("step over its slowest stage or link", best.over_bound, MOST_OVER_BOUND, at_least=False)


def _loss(best: Row, mine: Sequence[Row], loss_of: LossOf) -> Iterator[Goal]:
    dense = _dense(mine)
    if dense is None:
        return
    reached, wanted = loss_of(best), loss_of(dense)
    if reached is not None and wanted is not None:
        yield Goal("loss after 300 steps over dense", reached / wanted, MOST_LOSS, at_least=False)


def _dense(mine: Sequence[Row]) -> Row | None:
    return next((row for row in mine if row.name == f"ours: {DENSE.name}"), None)
