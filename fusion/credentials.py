"""Where `fusion coordinator` leaves its address and token for the same user, and how client commands find them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fusion.errors import UserError
from fusion.tls import CA_VARIABLE


@dataclass(frozen=True)
class Credentials:
    """How to reach a coordinator."""

    url: str
    token: str | None = None
    ca: str | None = None
    """A file with the certificates to trust, where no authority knows the coordinator's."""


def check_token(token: str | None) -> None:
    """Whether it can stand in a header; it is a secret, so the message does not show it. Raises `UserError`."""
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise UserError(
            "the token has a space, a line end or another character that no token has; copy it again, whole and alone"
        )


def config_folder() -> Path:
    """`$FUSION_CONFIG_DIR`, or `fusion` in the user's XDG configuration folder."""
    own = os.environ.get("FUSION_CONFIG_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "fusion"


def credentials_file() -> Path:
    return config_folder() / "coordinator.json"


def write(url: str, token: str | None, ca: str | None = None) -> Path:
    """Leave `url`, `token` and `ca` for the same user only (mode 0600); replaces what was there in one move."""
    path = credentials_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump({"url": url, "token": token, "ca": ca}, file)
    os.replace(fresh, path)
    return path


def read() -> Credentials | None:
    """What a coordinator of this user left, or None. Raises `UserError` when the file is damaged."""
    path = credentials_file()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        url, token, ca = data["url"], data.get("token"), data.get("ca")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: can't read the coordinator's address ({error}); remove it, or give --coordinator URL"
        ) from None
    if not isinstance(url, str) or not all(part is None or isinstance(part, str) for part in (token, ca)):
        raise UserError(f"{path}: not a coordinator's address; remove it, or give --coordinator URL")
    return Credentials(url, token, ca)


def resolve(url: str | None = None, token: str | None = None, ca: str | None = None) -> Credentials:
    """Flag, then environment (`FUSION_COORDINATOR`, `FUSION_TOKEN`, `FUSION_TLS_CA`), then the file.

    The file's token and certificate are used only for the file's own address, so that they never go to another host.
    Raises `UserError` when nothing names a coordinator.
    """
    url = url or os.environ.get("FUSION_COORDINATOR") or None
    token = token or os.environ.get("FUSION_TOKEN") or None
    ca = ca or os.environ.get(CA_VARIABLE) or None
    if url is not None and token is not None and (ca is not None or not url.startswith("https:")):
        return Credentials(url, token, ca)
    stored = read()
    if url is None:
        if stored is None:
            raise UserError(
                "no coordinator known: start one with `fusion coordinator`, or give --coordinator URL "
                "(or set FUSION_COORDINATOR)"
            )
        return Credentials(stored.url, token or stored.token, ca or stored.ca)
    if stored is not None and stored.url.rstrip("/") == url.rstrip("/"):
        token, ca = token or stored.token, ca or stored.ca
    return Credentials(url, token, ca)
