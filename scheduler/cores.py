"""Cores that several devices share: while there are too few for all that compute, each gets its part of them.

Processor sharing, as an operating system does it among threads of equal weight: all that compute go on at the same pace, which
is 1 as long as there are cores enough. Kept in the time of that pace, in which a task takes as long as on a core of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from scheduler.devices import Device


@dataclass(slots=True, eq=False)
class SharedCores:
    """What computes on one processor. Times are seconds, and must not go back."""

    cores: float
    demands: dict[int, float]
    """Device -> cores that it keeps busy while it computes."""
    _ends: dict[int, float] = field(default_factory=dict)
    _time: float = 0.0
    _done: float = 0.0

    @property
    def pace(self) -> float:
        """Of a device with a core of its own."""
        wanted = sum(self.demands[device] for device in self._ends)
        return min(1.0, self.cores / wanted) if wanted > 0 else 1.0

    def start(self, time: float, device: int, seconds: float) -> None:
        """It begins what would take so many seconds on a core of its own."""
        self._until(time)
        self._ends[device] = self._done + seconds

    def stop(self, time: float, device: int) -> float:
        """It ends, or gives way: the seconds that would still be left on a core of its own."""
        self._until(time)
        return max(0.0, self._ends.pop(device) - self._done)

    def next_end(self) -> tuple[float, int] | None:
        """When, and which, is done first if nothing else begins or ends before."""
        if not self._ends:
            return None
        device = min(self._ends, key=lambda each: (self._ends[each], each))
        return self._time + max(0.0, self._ends[device] - self._done) / self.pace, device

    def _until(self, time: float) -> None:
        self._done += (time - self._time) * self.pace
        self._time = time


def crowded(devices: Sequence[Device], among: Sequence[int] | None = None) -> list[SharedCores]:
    """The processors that have too few cores for all of these devices at once (indices; default: all)."""
    groups: dict[str, dict[int, float]] = defaultdict(dict)
    cores: dict[str, float] = {}
    for index in dict.fromkeys(range(len(devices)) if among is None else among):
        device = devices[index]
        if device.processor is not None:
            groups[device.processor.name][index] = device.cores
            cores[device.processor.name] = device.processor.cores
    return [
        SharedCores(cores[name], demands)
        for name, demands in groups.items()
        if len(demands) > 1 and sum(demands.values()) > cores[name]
    ]
