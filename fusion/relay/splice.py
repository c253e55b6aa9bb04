"""Copies bytes between two connections until one of them ends. What waits in between is bounded; a slow end slows the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

CHUNK_BYTES = 256 * 1024
"""Read at once, and kept at most for an end that does not take it: streams that share a process take turns after so much."""


async def splice(first: Stream, second: Stream, moved: Callable[[int, int], None] = lambda *_: None) -> None:
    """Copy both ways; returns when either end is closed, and closes the other. `moved(which end, bytes)` hears of each chunk."""
    directions = [
        asyncio.create_task(_copy(first[0], second[1], lambda count: moved(0, count))),
        asyncio.create_task(_copy(second[0], first[1], lambda count: moved(1, count))),
    ]
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
        for _, writer in (first, second):
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, moved: Callable[[int], None]) -> None:
    writer.transport.set_write_buffer_limits(high=CHUNK_BYTES)
    with contextlib.suppress(OSError):
        while chunk := await reader.read(CHUNK_BYTES):
            moved(len(chunk))
            writer.write(chunk)
            await writer.drain()
