"""How two workers that can't reach each other meet at a relay."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fusion.messages.base import Message
from fusion.messages.pool import PeerAddress


class RelayPass(Message):
    """Lets one end of one direction of a pair in at a relay (`fusion.relay`)."""

    host: str = Field(max_length=255, description="Empty for the coordinator's, as the worker knows it.")
    port: int = Field(gt=0, lt=65536)
    ticket: str = Field(pattern=r"^[0-9a-f]{32}$")
    secret: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)


class UseRelay(Message):
    """Coordinator -> worker: from now on reach this peer, and be reached by it, so; without passes directly again."""

    type: Literal["use-relay"] = "use-relay"
    peer: str
    public_key: str
    call: RelayPass | None = None
    """For what we send."""
    answer: RelayPass | None = None
    """For what it sends."""


class TryDirect(Message):
    """Coordinator -> worker: see whether you can connect to this peer, and let it in while it does the same; say `Reached` if so."""

    type: Literal["try-direct"] = "try-direct"
    peer: PeerAddress


class ServeRelay(Message):
    """Coordinator -> worker that offers a relay: these tickets, with their secrets, count from now on, and no others."""

    type: Literal["serve-relay"] = "serve-relay"
    tickets: dict[str, str] = Field(repr=False)


class Unreached(Message):
    """Worker -> coordinator: this peer could not be connected to for a while; said again as long as that is so."""

    type: Literal["unreached"] = "unreached"
    peer: str


class Reached(Message):
    """Worker -> coordinator: the connection to this peer, by way of a relay, is up; or it was tried `directly`, and works."""

    type: Literal["reached"] = "reached"
    peer: str
    directly: bool = False
