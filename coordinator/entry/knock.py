"""Tries whether a worker that joins can be connected to, so that it hears at once what is wrong with its address."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from fusion.addresses import is_loopback

_SECONDS = 1.5
"""Within the time after which a worker that says nothing counts as lost."""


async def can_be_reached(endpoint: str, seen_as: str) -> bool | None:
    """Whether somebody listens at `tcp://host:port`; None where a try from here would say nothing.

    Only the address that the worker itself came from is tried: a worker must not find out by us what else listens where.
    """
    if not is_own(endpoint, seen_as):
        return None
    address = urlsplit(endpoint)
    host, port = address.hostname or "", address.port or 0
    if is_loopback(host):
        return None
    try:
        async with asyncio.timeout(_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    return True


def is_own(endpoint: str, seen_as: str) -> bool:
    """Whether `tcp://host:port` is at the address that its worker came from."""
    try:
        address = urlsplit(endpoint)
        return bool(address.hostname == seen_as and seen_as and address.port)
    except ValueError:
        return False
