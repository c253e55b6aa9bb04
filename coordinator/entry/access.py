"""The coordinator's own secrets: a token for each role and the CURVE keys, made at the first start.

All are files in the state folder that only their owner can read. `coordinator.http.guard` decides what a token opens.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fusion.errors import ServiceError
from fusion.sockets import KeyPair, new_keys


@dataclass(frozen=True, slots=True)
class Access:
    """The secrets of one coordinator."""

    operator_token: str = field(repr=False)
    join_token: str = field(repr=False)
    viewer_token: str = field(repr=False)
    keys: KeyPair


def load(state: Path, token: str | None = None, join_token: str | None = None) -> Access:
    """Read the secrets, or make those that are missing. `token` replaces the operator's for this run only, `join_token`
    the workers'.

    Raises `ServiceError` when a file is unreadable or damaged, or can't be made.
    """
    operator = token or _read_or_make(state / "operator.token", lambda: secrets.token_urlsafe(24))
    join = join_token or _read_or_make(state / "join.token", lambda: secrets.token_urlsafe(24))
    viewer = _read_or_make(state / "viewer.token", lambda: secrets.token_urlsafe(24))
    path = state / "control.keys"
    text = _read_or_make(path, _fresh_keys)
    try:
        stored = json.loads(text)
        keys = KeyPair(str(stored["public"]), str(stored["secret"]))
    except (ValueError, KeyError, TypeError):
        raise ServiceError(f"{path} is damaged; remove it (workers then have to join again)") from None
    return Access(operator, join, viewer, keys)


def _fresh_keys() -> str:
    keys = new_keys()
    return json.dumps({"public": keys.public, "secret": keys.secret})


def _read_or_make(path: Path, make: Callable[[], str]) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        text = make()
        write_private(path, text + "\n")
        return text
    except (OSError, UnicodeDecodeError) as error:
        raise ServiceError(f"can't read {path}: {error}") from None
    if not text:
        raise ServiceError(f"{path} is empty; remove it to have a new one made")
    return text


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, in one move. Raises `ServiceError`."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise ServiceError(f"can't write {path}: {error.strerror}") from None
