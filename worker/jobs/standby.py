"""Fragments that this worker is to take over if their hosts are lost: built ahead of need, so that adopting takes no time.

Building goes on beside the training, one fragment after the other; the state comes with the adoption.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from worker.jobs.assembly import Assembly, Piece, build
from worker.jobs.fetch import Fetcher
from worker.machine.memory import MemoryGuard

log = logging.getLogger("fusion.worker")

OnFailure = Callable[[int, BaseException], None]


class Standby:
    """The pieces of one job that stand by on one worker. Belongs to the event loop."""

    def __init__(
        self, assembly: Assembly, device: str, fetcher: Fetcher, memory: MemoryGuard, on_failure: OnFailure
    ) -> None:
        self._assembly = assembly
        self._device = device
        self._fetcher = fetcher
        self._memory = memory
        self._on_failure = on_failure
        self._building: dict[int, asyncio.Task[Piece]] = {}
        self._one_at_a_time = asyncio.Lock()

    def want(self, fragments: Iterable[int]) -> None:
        """Have these stand by, and no others."""
        wanted = set(fragments)
        for fragment in set(self._building) - wanted:
            self._building.pop(fragment).cancel()
        for fragment in sorted(wanted - set(self._building)):
            self._begin(fragment)

    async def take(self, fragment: int) -> Piece:
        """The fragment, in the state in which the run began. Raises what `worker.jobs.assembly.build` raises."""
        ahead = self._building.pop(fragment, None)
        if ahead is not None:
            try:
                return await ahead
            except Exception as error:
                log.info("building fragment %d once more: %s", fragment, error)
        return await self._build(fragment)

    async def close(self) -> None:
        tasks = list(self._building.values())
        self._building.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, fragment: int) -> None:
        task = self._building[fragment] = asyncio.create_task(self._build(fragment), name=f"standby {fragment}")
        task.add_done_callback(lambda done: self._ended(fragment, done))

    async def build(self, fragment: int) -> Piece:
        """The fragment once more, in the state in which the run began, whatever stands by."""
        return (await build(self._assembly, (fragment,), self._device, self._fetcher, self._memory))[fragment]

    async def _build(self, fragment: int) -> Piece:
        async with self._one_at_a_time:
            return await self.build(fragment)

    def _ended(self, fragment: int, task: asyncio.Task[Piece]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(fragment, error)
