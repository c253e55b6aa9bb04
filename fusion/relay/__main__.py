"""The relay's own process: `python -m fusion.relay DESCRIPTOR` serves an inherited socket until standard input ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
import threading

from fusion.relay.server import RelayServer

_NICENESS = 5
"""Whoever serves people and heartbeats on the same machine comes first."""


async def _serve(listener: socket.socket) -> None:
    relay, over, loop = RelayServer(), asyncio.Event(), asyncio.get_running_loop()
    # Who comes before the tickets are here waits at the door.
    relay.allow(_tickets(await asyncio.to_thread(sys.stdin.buffer.readline)))

    def follow() -> None:
        # A thread, because not every standard input can be polled.
        for line in sys.stdin.buffer:
            loop.call_soon_threadsafe(relay.allow, _tickets(line))
        loop.call_soon_threadsafe(over.set)

    await relay.start(listener)
    threading.Thread(target=follow, name="orders", daemon=True).start()
    await over.wait()
    await relay.close()


def _tickets(line: bytes) -> dict[bytes, bytes]:
    found = json.loads(line)["tickets"] if line else {}
    return {bytes.fromhex(ticket): bytes.fromhex(secret) for ticket, secret in found.items()}


def main() -> None:
    with contextlib.suppress(OSError):
        os.nice(_NICENESS)
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.setblocking(False)
    asyncio.run(_serve(listener))


if __name__ == "__main__":
    main()
