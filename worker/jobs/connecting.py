"""Connections to the other workers of a job, as its plans come: one attempt at a time, and none for longer than its plan holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pydantic import BaseModel

from fusion.errors import FusionError
from fusion.messages import Adopt, Connected, PeerAddress, Prepare, Warned
from worker.jobs.explain import explain
from worker.transport.mover import Mover
from worker.transport.route import Route

HANDSHAKE_PATIENCE = 30.0
"""Seconds for a handshake."""
_PATIENCE_AGAIN = 10.0
"""For that of another try: orders that come meanwhile wait for it."""
_AGAIN = 1.0


class Connecting:
    """Of one job on one worker. `send` passes a report on to the coordinator; nothing is tried once `abandoned`."""

    def __init__(
        self,
        prepare: Prepare,
        worker: str,
        mover: Mover,
        send: Callable[[BaseModel], None],
        abandoned: Callable[[], bool],
    ) -> None:
        self._job = prepare.job
        self._worker = worker
        self._mover = mover
        self._send = send
        self._abandoned = abandoned
        self._lock = asyncio.Lock()
        self.newest = prepare.plan.epoch
        """The newest plan epoch that there are orders for."""

    def others(self, peers: list[PeerAddress]) -> list[PeerAddress]:
        """All but this worker."""
        return [peer for peer in peers if peer.worker != self._worker]

    async def to(self, route: Route, peers: list[PeerAddress]) -> None:
        """Admit and connect to workers that may get fragments soon."""
        async with self._lock:
            await self._connect(route, peers)

    async def as_planned(self, route: Route, order: Adopt) -> bool:
        """Be connected to the workers of this plan, and to nobody else; False when some could not be reached."""
        wanted = {peer.worker: peer.public_key for peer in order.peers}
        async with self._lock:  # Whom the plan before still tries to reach is about to be let go of.
            for name, peer in route.connections.items():
                if wanted.get(name) != peer.address.public_key:
                    await asyncio.to_thread(self._mover.disconnect, route, name)
            if all(peer.worker in route.connections for peer in self.others(order.peers)):
                return True
            return await self._connect(route, order.peers, order.plan.epoch)

    async def at_last(self, route: Route, order: Adopt, reached: Callable[[str], None]) -> None:
        """Training under this plan waits for a worker that could not be reached when it came: try until another plan comes.

        `reached` hears of everybody once all are.
        """
        while True:
            await asyncio.sleep(_AGAIN)
            async with self._lock:
                if self.newest > order.plan.epoch:
                    return
                there = await self._connect(route, order.peers, order.plan.epoch, _PATIENCE_AGAIN)
            if there:
                for peer in self.others(order.peers):
                    reached(peer.worker)
                return

    async def _connect(
        self,
        route: Route,
        peers: list[PeerAddress],
        epoch: int | None = None,
        patience: float = HANDSHAKE_PATIENCE,
    ) -> bool:
        """False when some could not be reached.

        With the `epoch` of a plan this waits for handshakes no longer than the plan holds: a worker that it names may have
        died since, and then the next one, which says so, is here already. Whoever calls it holds the lock.
        """
        new = []
        for peer in self.others(peers):
            known = route.connections.get(peer.worker)
            if known is not None and known.address.public_key != peer.public_key:
                await asyncio.to_thread(self._mover.disconnect, route, peer.worker)  # its name has a new owner
                known = None
            if known is None:
                new.append(peer)

        def cancelled() -> bool:
            return self._abandoned() or (epoch is not None and self.newest > epoch)

        connecting = asyncio.create_task(
            asyncio.to_thread(self._mover.connect, route, new, patience=patience, cancelled=cancelled)
        )
        try:
            missing = await asyncio.shield(connecting)
        except asyncio.CancelledError:
            # The thread is about to see that we are: before the route is closed, or connections would be left behind.
            await asyncio.gather(connecting, return_exceptions=True)
            raise
        except FusionError as error:
            self._send(Warned(job=self._job, message=explain(error)))
            return False
        self._send(Connected(job=self._job, peers=[peer.worker for peer in peers if peer.worker not in missing]))
        return True
