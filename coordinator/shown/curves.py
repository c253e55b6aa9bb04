"""A job's metrics as curves of bounded size: buckets of steps with the least, greatest and mean value of each. Sans I/O.

However long a run is, what a page has to draw stays the same: when there are too many buckets, each two neighbours become
one, which covers twice the steps. A spike is never lost, because a bucket keeps its extremes. All buckets have their memory
from the start, eight bytes a figure, so that a coordinator with many jobs does not grow with their steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_BUCKETS = 1024
VALUES = ("loss", "step_seconds", "sent_bytes", "gradient_norm", "eval_loss")


class Column:
    """The values of one metric in every bucket; a bucket whose count is 0 has none."""

    def __init__(self, buckets: int) -> None:
        self.low, self.high, self.total = (array("d", bytes(8 * buckets)) for _ in range(3))
        self.count = array("q", bytes(8 * buckets))

    def add(self, at: int, value: float) -> None:
        self._take_in(at, value, value, value, 1)

    def join(self, at: int, other: int) -> None:
        """Move what bucket `other` has into bucket `at`."""
        if self.count[other]:
            self._take_in(at, self.low[other], self.high[other], self.total[other], self.count[other])
            self.count[other] = 0

    def _take_in(self, at: int, low: float, high: float, total: float, count: int) -> None:
        if self.count[at]:
            low, high, total = min(self.low[at], low), max(self.high[at], high), self.total[at] + total
        self.low[at], self.high[at], self.total[at] = low, high, total
        self.count[at] += count

    def shown(self, buckets: int) -> dict[str, list[float | None]]:
        """As JSON: null where a bucket has none."""
        counts = self.count[:buckets]

        def known(values: array[float]) -> list[float | None]:
            return [value if count else None for value, count in zip(values, counts, strict=False)]

        means = [total / count if count else None for total, count in zip(self.total, counts, strict=False)]
        return {"low": known(self.low), "high": known(self.high), "mean": means}


@dataclass(slots=True)
class Stretch:
    """The steps that ran under one plan epoch."""

    epoch: int
    first_step: int
    steps: int = 0
    seconds: float = 0.0


class Curves:
    """Takes metrics in step order; a step that was taken in already is left alone."""

    def __init__(self, most: int = MOST_BUCKETS) -> None:
        self.last = 0
        self.width = 1
        self.buckets = 0
        self.stretches: list[Stretch] = []
        self._most = most
        self._first, self._last = (array("q", bytes(8 * most)) for _ in range(2))
        self._columns = {name: Column(most) for name in VALUES}

    def add(self, metric: Mapping[str, Any]) -> None:
        """Take in one step, as the store gives it."""
        step = int(metric["step"])
        if step <= self.last:
            return
        self.last = step
        at = self._bucket_of(step)
        for name, column in self._columns.items():
            value = metric.get(name)
            if value is not None:
                column.add(at, value)
        if not self.stretches or self.stretches[-1].epoch != metric["epoch"]:
            self.stretches.append(Stretch(metric["epoch"], step))
        self.stretches[-1].steps += 1
        self.stretches[-1].seconds += metric["step_seconds"]

    def _bucket_of(self, step: int) -> int:
        """The bucket that covers `step` from now on: the last one, or a new one."""
        while not self._in_last_bucket(step):
            if self.buckets < self._most:
                self._first[self.buckets] = step
                self.buckets += 1
            else:
                self._halve()
        self._last[self.buckets - 1] = step
        return self.buckets - 1

    def _in_last_bucket(self, step: int) -> bool:
        # Buckets begin at multiples of their width, so that it does not matter when they were joined.
        return self.buckets > 0 and (self._first[self.buckets - 1] - 1) // self.width == (step - 1) // self.width

    def _halve(self) -> None:
        self.width *= 2
        known, self.buckets = self.buckets, 0
        for other in range(known):
            if not self._in_last_bucket(self._first[other]):
                self._first[self.buckets] = self._first[other]
                self.buckets += 1
            at = self.buckets - 1
            self._last[at] = self._last[other]
            if at != other:
                for column in self._columns.values():
                    column.join(at, other)

    def shown(self) -> dict[str, Any]:
        """As JSON: a list for each end of each value; null where a bucket has none."""
        return {
            "last": self.last,
            "width": self.width,
            "first_step": self._first[: self.buckets].tolist(),
            "last_step": self._last[: self.buckets].tolist(),
            "values": {name: column.shown(self.buckets) for name, column in self._columns.items()},
            "stretches": [
                {
                    "epoch": stretch.epoch,
                    "first_step": stretch.first_step,
                    "steps": stretch.steps,
                    "mean_step_seconds": stretch.seconds / stretch.steps,
                }
                for stretch in self.stretches
            ],
        }
