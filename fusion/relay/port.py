"""Binds a relay's port."""

from __future__ import annotations

import errno
import socket

from fusion.addresses import WILDCARDS
from fusion.errors import FusionError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises `FusionError` in one line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server(("" if host in WILDCARDS else host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise FusionError(f"the relay's port {port} is in use; choose another --relay-port") from None
        raise FusionError(f"the relay can't listen on {host}:{port}: {error.strerror or error}") from None
