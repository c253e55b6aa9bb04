"""The URL that lets a worker join: where the coordinator is, a token, and by what the worker knows that it is the right one."""

from __future__ import annotations

from dataclasses import dataclass

from coordinator.entry.tls import ServerTls
from fusion.sockets import key_to_hex


@dataclass(frozen=True, slots=True)
class Identity:
    """What only this coordinator can prove: its key on the control channel, and its certificate if nobody else knows that."""

    public_key: str
    fingerprint: str | None = None

    @classmethod
    def of(cls, public_key: str, tls: ServerTls | None) -> Identity:
        return cls(public_key, tls.fingerprint if tls is not None and not tls.known else None)

    def invitation(self, url: str, token: str) -> str:
        """What `fusion worker --join` takes."""
        joined = f"{url}?token={token}&key={key_to_hex(self.public_key)}"
        return joined if self.fingerprint is None else f"{joined}&cert={self.fingerprint}"
