"""The client for commands that talk to a pool."""

from __future__ import annotations

from pathlib import Path

from fusion.client import Client
from fusion.credentials import resolve


def connect(coordinator: str | None, token: str | None, ca: Path | None = None) -> Client:
    """Flag, environment, then the file of `fusion coordinator`. Raises `UserError`."""
    found = resolve(coordinator, token, str(ca) if ca is not None else None)
    return Client(found.url, found.token, ca=found.ca)
