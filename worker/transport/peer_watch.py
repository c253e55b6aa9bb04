"""Notices at once when a peer closes its connection: a process that was killed, say; and when it can't be connected to again.

What that means is not decided here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

AWAY_SECONDS = 6.0
"""Whoever can't be connected to again for so long may need another way: on a full link, a handshake takes seconds."""
_POLL_MILLISECONDS = 200


class PeerWatch:
    """Reads the monitors of connections on a thread of its own, from `add` until `retire` or `close`.

    Called on that thread: `on_lost(peer)` each time that a standing connection breaks, `on_away(peer)` now and then while it
    stays broken, `on_back(peer)` when it stands again.
    """

    def __init__(
        self,
        on_lost: Callable[[str], None],
        on_away: Callable[[str], None] = lambda _: None,
        on_back: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._on_lost = on_lost
        self._on_away = on_away
        self._on_back = on_back
        self._away: dict[str, float] = {}
        self._lock = threading.Lock()
        self._monitors: dict[str, zmq.Socket[bytes]] = {}
        self._retired: list[tuple[zmq.Socket[bytes], Callable[[zmq.Socket[bytes]], None]]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peer watch", daemon=True)
        self._thread.start()

    def add(self, monitors: dict[str, zmq.Socket[bytes]]) -> None:
        """Watch these connections too; the monitors must report EVENT_DISCONNECTED."""
        with self._lock:
            self._monitors |= monitors

    def retire(self, peer: str, dispose: Callable[[zmq.Socket[bytes]], None]) -> None:
        """Stop watching this one. `dispose(monitor)` is called on the watching thread, which reads it no more then."""
        with self._lock:
            monitor = self._monitors.pop(peer, None)
            self._away.pop(peer, None)
            if monitor is not None:
                self._retired.append((monitor, dispose))

    def close(self) -> dict[str, zmq.Socket[bytes]]:
        """End the thread; returns the monitors, to be closed once they are disabled."""
        self._stopping.set()
        self._thread.join()
        self._dispose()
        with self._lock:
            monitors, self._monitors = self._monitors, {}
        return monitors

    def _watch(self) -> None:
        while not self._stopping.is_set():
            self._dispose()
            with self._lock:
                monitors = dict(self._monitors)
            if not monitors:
                # pyzmq's poller answers at once when there is nothing to poll.
                self._stopping.wait(_POLL_MILLISECONDS / 1000)
                continue
            poller: Any = zmq.Poller()
            for monitor in monitors.values():
                poller.register(monitor, zmq.POLLIN)
            ready = {socket for socket, _ in poller.poll(_POLL_MILLISECONDS)}
            for peer, monitor in monitors.items():
                if monitor in ready:
                    self._read(peer, monitor)
            self._tell_of_absence()

    def _tell_of_absence(self) -> None:
        with self._lock:
            now = monotonic()
            away = [peer for peer, since in self._away.items() if now - since >= AWAY_SECONDS]
            self._away.update(dict.fromkeys(away, now))
        for peer in away:
            self._on_away(peer)

    def _dispose(self) -> None:
        with self._lock:
            retired, self._retired = self._retired, []
        for monitor, dispose in retired:
            dispose(monitor)

    def _read(self, peer: str, monitor: zmq.Socket[bytes]) -> None:
        with self._lock:
            if self._monitors.get(peer) is not monitor:
                return
            event = recv_monitor_message(monitor)["event"]
            if event == zmq.EVENT_DISCONNECTED:
                self._away.setdefault(peer, monotonic())
            elif event in (zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_HANDSHAKE_FAILED_AUTH):
                self._away.pop(peer, None)  # Whoever refuses us can be reached.
        if event == zmq.EVENT_DISCONNECTED:
            self._on_lost(peer)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._on_back(peer)
