"""The worker's dealings with its peers outside of any job: probes of links, ways over relays, the relay that it offers itself.

Belongs to the event loop; sockets have threads of their own, and an offered relay a process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from fusion.messages import (
    Arrivals,
    ExpectProbe,
    JoinResponse,
    PeerAddress,
    ProbeLink,
    Reached,
    RelayPass,
    ServeRelay,
    TryDirect,
    Unreached,
    UseRelay,
)
from fusion.relay.child import RelayProcess
from fusion.relay.port import listen
from fusion.sockets import KeyPair
from worker.transport.mover import Mover
from worker.transport.probe_socket import HANDSHAKE_SECONDS, measure_link, why_out_of_reach

_ARRIVALS_SECONDS = 3.0
_BOTH_SECONDS = 2.0
"""Two that try to reach each other may hear of it so far apart."""

Order = ExpectProbe | ProbeLink | UseRelay | TryDirect | ServeRelay

log = logging.getLogger("fusion.worker")


class Neighbours:
    """Follows the coordinator's orders about links. `send` passes a report on to it; `over` says that the worker ends."""

    def __init__(
        self, keys: KeyPair, mover: Mover, send: Callable[[BaseModel], None], over: Callable[[], bool]
    ) -> None:
        self._keys = keys
        self._mover = mover
        self._send = send
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._probing: set[asyncio.Task[None]] = set()
        self._relay: RelayProcess | None = None
        self._coordinator_host = self._own_host = ""

    def offer_relay(self, host: str, port: int, advertised: str) -> int:
        """Listen for others that can't reach each other; returns the port. Raises `FusionError` when it is taken."""
        self._relay, self._own_host = RelayProcess(listen(host, port)), advertised
        return self._relay.port

    async def joined(self, answer: JoinResponse) -> None:
        """A new incarnation begins: passes and tickets were the former one's."""
        self._coordinator_host = urlsplit(answer.control_endpoint).hostname or ""
        await asyncio.to_thread(self._mover.passages.forget_all)
        if self._relay is not None:
            self._relay.allow({})

    async def follow(self, order: Order) -> None:
        match order:
            case ExpectProbe():
                self._expect(order)
                self._begin(self._look_back(order.peer), f"a look back at {order.peer.worker}")
            case ProbeLink():
                # The other end looks whether it can reach us too.
                self._expect(order)
                self._begin(self._probe(order), f"a probe of the link to {order.peer.worker}")
            case UseRelay():
                await asyncio.to_thread(self._mover.use, self._with_host(order))
            case TryDirect():
                self._let_in(order.peer, 1, HANDSHAKE_SECONDS + _BOTH_SECONDS)
                self._begin(self._try_directly(order.peer), f"a try to reach {order.peer.worker}")
            case ServeRelay():
                if self._relay is not None:
                    self._relay.allow(order.tickets)

    async def report_arrivals(self) -> None:
        """Tell, now and then, how fast large messages of a job came in."""
        while True:
            await asyncio.sleep(_ARRIVALS_SECONDS)
            rates = self._mover.arrivals.take()
            if rates:
                self._send(Arrivals(rates=rates))

    async def close(self) -> None:
        """Wait for probes, which see that the worker ends, and end the relay."""
        await asyncio.gather(*self._probing, return_exceptions=True)
        if self._relay is not None:
            await asyncio.to_thread(self._relay.close)

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._probing.add(task := asyncio.create_task(work, name=name))
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._probing.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The coordinator takes a probe that it hears nothing of for one that failed.
            log.error("%s failed", task.get_name(), exc_info=error)

    def _expect(self, order: ExpectProbe | ProbeLink) -> None:
        # The asker's own time begins when it has been let in.
        self._let_in(order.peer, order.max_bytes, order.seconds + HANDSHAKE_SECONDS)

    def _let_in(self, peer: PeerAddress, max_bytes: int, allowed: float) -> None:
        self._mover.expect_probe(peer, max_bytes, allowed)
        self._loop.call_later(allowed + 0.1, self._mover.end_probes)

    async def _probe(self, asked: ProbeLink) -> None:
        endpoint = self._mover.passages.endpoint(asked.peer)
        self._send(
            await asyncio.to_thread(
                measure_link, self._keys, asked.peer, asked.max_bytes, asked.seconds, self._over, endpoint
            )
        )

    async def _look_back(self, peer: PeerAddress) -> None:
        """Whether we can reach whoever measures the link to us: that it reaches us says nothing of the way back."""
        if self._mover.passages.relayed(peer.public_key):
            return
        if await asyncio.to_thread(why_out_of_reach, self._keys, peer, self._over) and not self._over():
            self._send(Unreached(peer=peer.worker))

    async def _try_directly(self, peer: PeerAddress) -> None:
        if not await asyncio.to_thread(why_out_of_reach, self._keys, peer, self._over):
            self._send(Reached(peer=peer.worker, directly=True))

    def _with_host(self, order: UseRelay) -> UseRelay:
        """With the relay's address as seen from here: the coordinator's is where it is, and our own on this machine."""

        def seen(found: RelayPass) -> str:
            ours = self._relay is not None and (found.host, found.port) == (self._own_host, self._relay.port)
            return self._mover.passages.host if ours else found.host or self._coordinator_host

        def filled(found: RelayPass | None) -> RelayPass | None:
            return found and found.model_copy(update={"host": seen(found)})

        return order.model_copy(update={"call": filled(order.call), "answer": filled(order.answer)})
