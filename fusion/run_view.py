"""What a person sees of a running job: a live line at a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from fusion.client import StreamItem
from fusion.units import format_bytes, format_pace, format_seconds

_BARS = "▁▂▃▄▅▆▇█"
_SPARKLINE, _SHORTEST_SPARKLINE = 24, 6
_BAR_WIDTH = 20
PLAIN_LINES = 25
"""A plain run prints about so many lines for its steps."""
_QUIET_EVENTS = frozenset({"checkpoint", "checkpoint-written", "planned", "started", "submitted", "done", "finished"})


def sparkline(values: list[float], width: int = _SPARKLINE) -> str:
    """The course of `values` in at most `width` characters, each the mean of its share."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if len(finite) < 2:
        return ""
    count = min(width, len(finite))
    means = []
    for index in range(count):
        share = finite[index * len(finite) // count : (index + 1) * len(finite) // count]
        means.append(sum(share) / len(share))
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in means)


class History:
    """What the steps so far add up to."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        """One a step; NaN where its record says null: it was no finite number, or nobody told it."""
        self.evaluations: list[tuple[int, float]] = []
        self.seconds: list[float] = []
        self.sent_bytes = 0
        self.tokens = 0
        self.samples = 0
        self.step = 0

    def add(self, metric: dict[str, Any]) -> None:
        self.step = int(metric["step"])
        loss = metric.get("loss")
        self.losses.append(math.nan if loss is None else float(loss))
        if metric.get("eval_loss") is not None:
            self.evaluations.append((self.step, float(metric["eval_loss"])))
        self.seconds.append(float(metric.get("step_seconds") or 0.0))
        self.sent_bytes += int(metric.get("sent_bytes") or 0)
        self.tokens += int(metric.get("tokens") or 0)
        self.samples += int(metric.get("samples") or 0)

    @property
    def recent_seconds(self) -> float | None:
        """Median time of the last steps, which one slow step does not move."""
        last = sorted(self.seconds[-15:])
        return last[len(last) // 2] if last else None

    def remaining(self, steps: int) -> float | None:
        return None if self.recent_seconds is None else self.recent_seconds * (steps - self.step)

    @property
    def rate(self) -> str:
        """Tokens or samples per second over the whole run."""
        total = sum(self.seconds)
        return format_pace(self.tokens / total, self.samples / total) if total > 0 else "-"


def loss_text(value: float) -> str:
    """A loss as people read it: in few digits also while it runs away, `-` once it is no number any more."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


class _Facts(ProgressColumn):
    """The figures right of the bar."""

    def __init__(self, view: RunView) -> None:
        super().__init__()
        self._view = view

    def render(self, task: Task) -> Text:
        return Text.from_markup(self._view.facts())


class RunView:
    """Shows the items of `fusion.follow.follow`. Writes to stderr, so that stdout holds results only."""

    def __init__(self, name: str, steps: int, console: Console | None = None, *, quiet: bool = False) -> None:
        """`quiet` keeps the history and shows nothing."""
        self.history = History()
        self._name = name
        self._steps = steps
        self._console = console or Console(file=sys.stderr, highlight=False, quiet=quiet)
        self._live = self._console.is_terminal and not quiet
        self._state = ""
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            _Facts(self),
            console=self._console,
            refresh_per_second=4,
        )
        self._task = self._progress.add_task(name, total=steps, start=False)
        self._last_plain = 0.0

    def __enter__(self) -> Self:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.refresh()
            self._progress.stop()

    def say(self, text: str) -> None:
        """A line of its own."""
        self._console.print(text, markup=False, style="dim" if self._live else None, soft_wrap=True)

    def status(self, text: str) -> None:
        """What happens now, before the first step."""
        if self._live:
            self._state = text
            self._progress.refresh()
        else:
            self.say(text)

    def show(self, item: StreamItem) -> None:
        if item.kind == "metrics":
            self.history.add(item.data)
            self._progress.start_task(self._task)
            self._progress.update(self._task, completed=self.history.step)
            if not self._live:
                self._plain(item.data)
        elif item.kind == "event":
            if item.data.get("event") not in _QUIET_EVENTS:
                self.say(f"{item.data.get('event')}: {item.data.get('message')}")
        elif item.kind == "job":
            state, reason = str(item.data.get("state")), str(item.data.get("reason") or "")
            text = f"{state}: {reason}" if reason else state
            if state in ("queued", "preparing") and text != self._state:
                self.status(text)
            self._state = text

    def facts(self) -> str:
        """The live line's figures, in rich's markup."""
        history = self.history
        if not history.step:
            return f"[dim]{self._state.replace('[', '(')}[/dim]"
        loss = loss_text(history.losses[-1])
        parts = {"loss": f"loss {loss}"}
        if history.evaluations:
            parts["held out"] = f"held out {loss_text(history.evaluations[-1][1])}"
        parts["pace"] = f"{format_seconds(history.recent_seconds or 0)}/step"
        parts["sent"] = f"{format_bytes(history.sent_bytes)} sent"
        remaining = history.remaining(self._steps)
        if remaining is not None and history.step < self._steps:
            parts["left"] = f"ETA {format_seconds(remaining)}"
        for least in ("sent", "pace", "left", "held out"):
            if self._room(parts) < 0:
                parts.pop(least, None)
        room = self._room(parts) - 1
        course = sparkline(history.losses, min(_SPARKLINE, room)) if room >= _SHORTEST_SPARKLINE else ""
        parts["loss"] = f"loss [bold]{loss}[/bold]" + (f" [cyan]{course}[/cyan]" if course else "")
        return "  ".join(parts.values())

    def _room(self, parts: dict[str, str]) -> int:
        """Characters that a terminal's line has left beside name, bar, count and these figures."""
        before = f"{self._name} {' ' * _BAR_WIDTH} {self.history.step}/{self._steps} "
        return self._console.width - cell_len(before + "  ".join(parts.values()))

    def _plain(self, metric: dict[str, Any]) -> None:
        history = self.history
        every = max(1, self._steps // PLAIN_LINES)
        now = time.monotonic()
        due = history.step == 1 or history.step % every == 0 or history.step == self._steps
        if not due and metric.get("eval_loss") is None and now - self._last_plain < 30:
            return
        self._last_plain = now
        loss = loss_text(history.losses[-1])
        held_out = f"  held-out loss {loss_text(metric['eval_loss'])}" if metric.get("eval_loss") is not None else ""
        remaining = history.remaining(self._steps)
        eta = f"  ETA {format_seconds(remaining)}" if remaining else ""
        self.say(
            f"step {history.step}/{self._steps}  loss {loss}{held_out}  {format_seconds(metric['step_seconds'])}/step  "
            f"{format_bytes(history.sent_bytes)} sent{eta}"
        )
