"""What a worker daemon is told when it starts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import SplitResult, parse_qs

from fusion.addresses import split_url
from fusion.credentials import check_token
from fusion.errors import UserError
from fusion.logs import redact
from fusion.messages.pool import WORKER_NAME
from fusion.sockets import key_from_hex
from fusion.topology import Topology


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Settings of one worker process.

    `join` is the coordinator's `http://HOST:PORT`, with the pool's token as `?token=...` or in `token`.
    """

    join: str
    name: str | None = None
    """Name in the pool; default: the host's name and the process id."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    threads: int = 1
    """Compute threads. The bits of a run depend on it, so every worker of a pool should use the same."""
    speed: float | None = None
    """FLOP/s of training, as a person declares it; default: measured on joining."""
    profile_seconds: float = 0.1
    """How long to measure the device on joining."""
    memory_limit: int | None = None
    """Bytes this process may use; default: the memory of the machine (or of the GPU)."""
    advertise: str | None = None
    """`HOST:PORT` where peers reach the data socket, which listens on that port; default: the address that reaches the
    coordinator, any free port."""
    interface: str | None = None
    """The network interface whose address peers use, and that the data socket listens on; `advertise` and `listen` win."""
    listen: str | None = None
    """Address to listen on; default: loopback when the coordinator is on loopback, else every interface."""
    relay: bool = False
    """Offer a relay to workers that can't reach each other."""
    relay_port: int = 0
    """The port of the relay; 0: any free one."""
    token: str | None = None
    tls_ca: str | None = None
    """A file with the certificates to trust for https; default: the machine's, or the fingerprint of the join URL."""
    json_logs: bool = False
    """Everything is said as log lines in JSON on stderr."""
    exit_on_stdin_close: bool = False
    """Leave at once when stdin ends: a parent that dies takes its local workers along."""
    pause_when_busy: bool = False
    """Leave the pool while other programs need the machine, and join again when they are quiet."""
    topology: Topology | None = None
    """Local mode: act as this worker of it, with links and a device as slow as there."""
    max_frame_bytes: int = 2**30
    """A peer that sends a larger frame is cut off before memory is taken for it."""
    max_blob_bytes: int = 2**38
    """Larger blobs are not fetched."""

    def __post_init__(self) -> None:
        """Raises `UserError`."""
        if self.name is not None and self.name and not re.fullmatch(WORKER_NAME, self.name):
            shown = repr(self.name) if len(self.name) <= 80 else f"{self.name[:77]!r}..."
            raise UserError(
                f"--name {shown} is not a worker's name: up to 64 letters, digits, points, dashes and underscores, with a "
                "letter or digit first"
            )
        check_token(self.bearer)

    @property
    def _join_url(self) -> SplitResult:
        # A URL copied with the quotes that shield its `?` from the shell still means the same.
        parts = split_url(self.join.strip().strip("'\""))
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"--join {redact(self.join)!r} is not a coordinator's address; it looks like http://HOST:PORT?token=..."
            )
        try:
            _ = parts.port
        except ValueError:
            raise UserError(f"--join {redact(self.join)!r}: the port is not a number between 1 and 65535") from None
        return parts

    @property
    def coordinator(self) -> str:
        """Base URL without token. Raises `UserError`."""
        return f"{self._join_url.scheme}://{self._join_url.netloc}"

    @property
    def bearer(self) -> str | None:
        """The pool's token: from the join URL, else `token`. Raises `UserError`."""
        return parse_qs(self._join_url.query).get("token", [self.token])[0]

    @property
    def fingerprint(self) -> bytes | None:
        """SHA-256 of the coordinator's certificate, where the join URL carries it. Raises `UserError`."""
        text = parse_qs(self._join_url.query).get("cert", [""])[0]
        if not text:
            return None
        if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
            raise UserError(f"--join: cert={text[:70]} is not a certificate's fingerprint; copy the whole join command")
        return bytes.fromhex(text)

    @property
    def coordinator_key(self) -> str | None:
        """The coordinator's public key, where the join URL carries it. Raises `UserError`."""
        text = parse_qs(self._join_url.query).get("key", [""])[0]
        try:
            return key_from_hex(text) if text else None
        except ValueError:
            raise UserError(
                f"--join: key={text[:70]} is not a coordinator's key; copy the whole join command"
            ) from None

    @property
    def advertised(self) -> tuple[str, int] | None:
        """Host and port of `advertise`. Raises `UserError`."""
        if self.advertise is None:
            return None
        host, _, port = self.advertise.rpartition(":")
        if not host or set(host) & set("/?#") or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UserError(f"--advertise {self.advertise!r} is not HOST:PORT")
        return host.strip("[]"), int(port)
