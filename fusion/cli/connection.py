"""The client for commands that talk to a pool."""

from __future__ import annotations

from fusion.client import Client
from fusion.credentials import resolve


def connect(coordinator: str | None, token: str | None) -> Client:
    """Flag, environment, then the file of `fusion coordinator`. Raises `UserError`."""
    found = resolve(coordinator, token)
    return Client(found.url, found.token)
