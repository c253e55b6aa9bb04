"""Counts durations in buckets one percent wide: of fixed size, and in shared memory where another process reads along."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path

_LEAST = 1e-6
_WIDTH = math.log(1.01)
_BUCKETS = 2048
"""From a microsecond to eleven minutes."""


class Histogram:
    """Durations in seconds. One process adds; with a `path`, others that open it see what was added, even after a SIGKILL."""

    def __init__(self, path: Path | None = None) -> None:
        size = 8 * _BUCKETS
        if path is None:
            self._counts = memoryview(bytearray(size)).cast("Q")
            return
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(handle, size)
        self._counts = memoryview(mmap.mmap(handle, size)).cast("Q")
        os.close(handle)

    def add(self, seconds: float) -> None:
        bucket = int(math.log(max(seconds, _LEAST) / _LEAST) / _WIDTH)
        self._counts[min(bucket, _BUCKETS - 1)] += 1

    def clear(self) -> None:
        for bucket in range(_BUCKETS):
            self._counts[bucket] = 0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def quantile(self, share: float) -> float:
        """Seconds that this share of the durations stays below; NaN when there are none."""
        wanted, seen = math.ceil(share * self.count), 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= wanted > 0:
                return _LEAST * math.exp((bucket + 1) * _WIDTH)
        return math.nan

    def summary(self) -> dict[str, float]:
        """In milliseconds."""
        shares = {"median_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999, "worst_ms": 1.0}
        return {"count": self.count, **{name: round(1e3 * self.quantile(share), 3) for name, share in shares.items()}}
