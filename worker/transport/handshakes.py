"""Waits until other workers have let us in: ZeroMQ tells of handshakes by monitors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from fusion.errors import UnreachableError
from worker.transport.route import Peer

_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
)
HANDSHAKE_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | _HANDSHAKE_FAILED | zmq.EVENT_MONITOR_STOPPED
"""What the monitors given to `await_handshakes` must report."""
AWAY_SECONDS = 3.0
"""Whoever could not be connected to for so long may need another way. Later, where there was a connection (`peer_watch.py`)."""
_POLL_MILLISECONDS = 200
_RETRY_SECONDS = 0.1


class UnreachedPeersError(UnreachableError):
    """These have not let us in within the time that there was; all others have."""

    def __init__(self, missing: Sequence[Peer]) -> None:
        places = ", ".join(f"{peer.address.worker} at {peer.address.endpoint}" for peer in missing)
        super().__init__(
            f"can't reach {places}; is that port open between the machines? (fusion worker --advertise HOST:PORT sets it)"
        )
        self.names = [peer.address.worker for peer in missing]


def close_monitors(connections: dict[str, Peer], monitors: dict[str, zmq.Socket[bytes]]) -> None:
    """Let go of these connections' monitors; the connections may be closed after that."""
    # In this order: libzmq blocks on the last word to a monitor that nobody can read any more.
    for name, monitor in monitors.items():
        if name in connections:
            with connections[name].lock:
                connections[name].socket.disable_monitor()
        monitor.close(0)


def await_handshakes(
    monitors: dict[str, zmq.Socket[bytes]],
    connections: dict[str, Peer],
    patience: float,
    cancelled: Callable[[], bool],
    unreached: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Return when every peer has let us in; `unreached` hears, again and again, of those who don't even refuse us.

    When it is `cancelled` before that, it returns who has not: nobody tries again to get in there.

    A peer that has not heard of the job yet refuses our key, and ZeroMQ never tries again after a refusal, so we do.
    """
    deadline = monotonic() + patience
    poller: Any = zmq.Poller()
    names: dict[Any, str] = {}
    told_at = dict.fromkeys(connections, monotonic())
    for name, monitor in monitors.items():
        poller.register(monitor, zmq.POLLIN)
        names[monitor] = name
    refused: deque[tuple[float, str]] = deque()
    while names and not cancelled():
        left = deadline - monotonic()
        if left <= 0:
            raise UnreachedPeersError([connections[name] for name in names.values()])
        wait = min(left, _RETRY_SECONDS if refused else _POLL_MILLISECONDS / 1000)
        for monitor, _ in poller.poll(wait * 1000):
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                poller.unregister(monitor)
                del names[monitor]
            elif event & _HANDSHAKE_FAILED:
                refused.append((monotonic() + _RETRY_SECONDS, names[monitor]))
                told_at[names[monitor]] = monotonic()
        for name in names.values():
            if monotonic() - told_at[name] >= AWAY_SECONDS:
                told_at[name] = monotonic()
                unreached(name)
        while refused and refused[0][0] <= monotonic():
            connections[refused.popleft()[1]].connect_again()
    return list(names.values())
