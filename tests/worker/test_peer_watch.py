"""The thread that notices closed connections: what it costs a worker that has no peers."""

from __future__ import annotations

import threading
import time

from worker.transport.peer_watch import PeerWatch


def test_it_sleeps_while_there_is_nothing_to_watch():
    rounds: list[float] = []
    enough = threading.Event()

    class Counted(PeerWatch):
        def _dispose(self) -> None:
            rounds.append(time.monotonic())
            if len(rounds) == 4:
                enough.set()
            super()._dispose()

    watch = Counted(lambda peer: None)
    assert enough.wait(10)
    watch.close()
    assert rounds[3] - rounds[0] > 0.3
