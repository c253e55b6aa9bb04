"""The coordinator's time."""

from __future__ import annotations

import time


class Clock:
    """Seconds since the epoch that never go back: the wall clock at the start, the monotonic one from then on."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        return self._offset + time.monotonic()
