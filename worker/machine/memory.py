"""Keeps a worker within its memory limit, and says so in words when it can't."""

from __future__ import annotations

import os

import psutil

from fusion.errors import PlanError
from fusion.units import format_bytes


class MemoryGuard:
    """The limit (bytes) of a worker on `device`, and what it uses: of the machine's memory, or of the GPU's."""

    def __init__(self, limit: int, device: str = "cpu") -> None:
        self.limit = limit
        self._device = device
        self._process = psutil.Process(os.getpid())

    def used(self) -> int:
        """Resident bytes of this process, or bytes that it holds on the GPU."""
        if self._device.startswith("cuda"):
            import torch

            return int(torch.cuda.memory_reserved(self._device))
        return int(self._process.memory_info().rss)

    def check(self, used: int | None = None) -> None:
        """Raises `PlanError` when the process is over its limit."""
        used = self.used() if used is None else used
        if used > self.limit:
            raise PlanError(
                f"uses {format_bytes(used)} of the {format_bytes(self.limit)} it may; raise --memory-limit, add workers, "
                "use a smaller micro_batch, or train.recompute: true"
            )

    def require(self, more: int, what: str) -> None:
        """Raises `PlanError` when `more` bytes for `what` would go over the limit."""
        used = self.used()
        if used + more > self.limit:
            raise PlanError(
                f"{what} would take {format_bytes(more)} on top of {format_bytes(used)} in use, the limit is "
                f"{format_bytes(self.limit)}; raise --memory-limit or add workers"
            )
