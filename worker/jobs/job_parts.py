"""What a job has on this worker once its fragments are built and its peers connected, and fragments that come later."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fusion.errors import BlobError
from fusion.messages import Check
from worker.jobs.assembly import Piece
from worker.jobs.backups import Backups
from worker.jobs.host import JobHost
from worker.jobs.rerun import Examine
from worker.jobs.spot_checks import Testify
from worker.jobs.standby import Standby
from worker.transport.route import Route


@dataclass(frozen=True)
class Parts:
    """Belongs to the event loop; reading and loading states is left to threads."""

    host: JobHost
    route: Route
    backups: Backups
    standby: Standby

    def stand_by(self, backups: Mapping[int, str]) -> None:
        """Build what this worker is to take over (fragment -> backup worker) ahead of need."""
        mine = {fragment for fragment, worker in backups.items() if worker == self.host.assembly.worker}
        self.standby.want(mine - set(self.host.hosted))

    async def install(self, fragment: int, step: int) -> Piece:
        """The fragment with its state after `step`: that which is held here, or the one in which the run began."""
        state: dict[str, Tensor] | None = None
        try:
            state = await asyncio.to_thread(self.backups.state, fragment, step)
        except BlobError:
            if step != self._before_the_run:
                raise
        piece = await self.standby.take(fragment)
        if state is not None:
            await asyncio.to_thread(piece.load_state, state)
        return piece

    async def testify(self, order: Check) -> str:
        """Have the host say what it knows of the work that is checked; returns the digest of the state that is held here."""
        held = await asyncio.to_thread(self.backups.digest, order.fragment, order.through)
        self.host.post(Testify(order, held))
        return held

    async def examine(self, order: Check, held: str) -> None:
        """Build the fragment once more, in the state after `order.after`, and have the host run the work again."""
        fragment, before, expected = order.fragment, None, None
        if order.after != self._before_the_run:
            before = await asyncio.to_thread(self.backups.state, fragment, order.after)
        piece = await self.standby.build(fragment)
        if before is not None:
            await asyncio.to_thread(piece.load_state, before)
        if not order.exact and held:
            expected = await asyncio.to_thread(self.backups.state, fragment, order.through)
        self.host.post(Examine(order, piece, expected))

    async def close(self) -> None:
        """Stop computing and free the memory; the route is its owner's to close."""
        await self.standby.close()
        await asyncio.to_thread(self.host.stop)
        await asyncio.to_thread(self.backups.close)

    @property
    def _before_the_run(self) -> int:
        return self.host.assembly.first_step - 1
