"""What the processor has been doing, and for whom."""

from __future__ import annotations

import time

import psutil

from worker.machine.owner import Reading

_IDLE = ("idle", "iowait", "steal", "guest", "guest_nice")
"""Fields of the machine's times that are no work of programs here, or are counted in another field already."""


def reading() -> Reading:
    """The machine's and this process's processor time until now."""
    whole = psutil.cpu_times()
    own = psutil.Process().cpu_times()
    busy = sum(value for name, value in whole._asdict().items() if name not in _IDLE)
    return Reading(time.monotonic(), busy, own.user + own.system)
