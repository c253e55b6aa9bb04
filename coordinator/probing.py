"""Knocks at a worker's door: refused connections mean that its process is gone, whatever else means nothing.

A stalled process or a dead machine does not refuse, so they are for the heartbeats to decide.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

PATIENCE = 2.0
_FIRST_WAIT = 0.25
"""For an answer to the first knock; it doubles. A lost packet alone would be sent again after a second."""
_PAUSE = 0.02


async def refuses(endpoint: str, patience: float = PATIENCE) -> bool:
    """Whether nobody listens at `endpoint` (`tcp://host:port`)."""
    try:
        address = urlsplit(endpoint)
        async with asyncio.timeout(patience):
            # Accepted and closed again: a process that is just being taken down, or one that sends us away.
            wait = _FIRST_WAIT
            while True:
                try:
                    async with asyncio.timeout(wait):
                        if await _greets(address.hostname or "", address.port or 0):
                            return False
                except TimeoutError:
                    wait *= 2
                await asyncio.sleep(_PAUSE)
    except ConnectionRefusedError:
        return bool(address.hostname and address.port)
    except (OSError, TimeoutError, ValueError):
        pass  # Out of reach, or no address at all.
    return False


async def greets(endpoint: str, patience: float = PATIENCE) -> bool:
    """Whether whoever listens at `endpoint` answers as a worker does."""
    try:
        address = urlsplit(endpoint)
        async with asyncio.timeout(patience):
            return await _greets(address.hostname or "", address.port or 0)
    except (OSError, TimeoutError, ValueError):
        return False


async def _greets(host: str, port: int) -> bool:
    """Whether ZeroMQ's greeting comes before the connection ends. Raises `OSError`."""
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection(host, port)
        return bool(await reader.read(1))
    except ConnectionResetError:
        return False  # Where a process is being taken down, this may come as the answer to the connection itself.
    finally:
        if writer is not None:
            writer.close()
