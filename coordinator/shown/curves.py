"""A job's metrics as curves of bounded size: buckets of steps with the least, greatest and mean value of each. Sans I/O.

However long a run is, what a page has to draw stays the same: when there are too many buckets, each two neighbours become
one, which covers twice the steps. A spike is never lost, because a bucket keeps its extremes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_BUCKETS = 1024
VALUES = ("loss", "step_seconds", "sent_bytes", "gradient_norm", "eval_loss")


@dataclass(slots=True)
class Spread:
    """The values of one metric in one bucket."""

    low: float
    high: float
    total: float
    count: int

    def join(self, other: Spread) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.total += other.total
        self.count += other.count


@dataclass(slots=True)
class Bucket:
    """The steps from `first` to `last`."""

    first: int
    last: int
    values: dict[str, Spread] = field(default_factory=dict)

    def join(self, other: Bucket) -> None:
        self.last = other.last
        for name, spread in other.values.items():
            if name in self.values:
                self.values[name].join(spread)
            else:
                self.values[name] = spread


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
        self.buckets: list[Bucket] = []
        self.stretches: list[Stretch] = []
        self._most = most

    def add(self, metric: Mapping[str, Any]) -> None:
        """Take in one step, as the store gives it."""
        step = int(metric["step"])
        if step <= self.last:
            return
        self.last = step
        fresh = Bucket(step, step)
        for name in VALUES:
            value = metric.get(name)
            if value is not None:
                fresh.values[name] = Spread(value, value, value, 1)
        # Buckets begin at multiples of their width, so that it does not matter when they were joined.
        if self.buckets and (self.buckets[-1].first - 1) // self.width == (step - 1) // self.width:
            self.buckets[-1].join(fresh)
        else:
            self.buckets.append(fresh)
            while len(self.buckets) > self._most:
                self._halve()
        if not self.stretches or self.stretches[-1].epoch != metric["epoch"]:
            self.stretches.append(Stretch(metric["epoch"], step))
        self.stretches[-1].steps += 1
        self.stretches[-1].seconds += metric["step_seconds"]

    def _halve(self) -> None:
        self.width *= 2
        joined: list[Bucket] = []
        for bucket in self.buckets:
            if joined and (joined[-1].first - 1) // self.width == (bucket.first - 1) // self.width:
                joined[-1].join(bucket)
            else:
                joined.append(bucket)
        self.buckets = joined

    def shown(self) -> dict[str, Any]:
        """As JSON: a list for each end of each value; null where a bucket has none."""
        values = {}
        for name in VALUES:
            spreads = [bucket.values.get(name) for bucket in self.buckets]
            values[name] = {
                "low": [spread and spread.low for spread in spreads],
                "high": [spread and spread.high for spread in spreads],
                "mean": [spread and spread.total / spread.count for spread in spreads],
            }
        return {
            "last": self.last,
            "width": self.width,
            "first_step": [bucket.first for bucket in self.buckets],
            "last_step": [bucket.last for bucket in self.buckets],
            "values": values,
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
