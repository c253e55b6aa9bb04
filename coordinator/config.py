"""Settings of the coordinator daemon, with their defaults and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from coordinator.life.books import Timing
from fusion.topology import Topology

DEFAULT_PORT = 8760


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """What `run_coordinator` needs. Sizes are bytes, durations seconds."""

    state: Path
    """Folder of everything that must survive a restart; made if it does not exist, readable by its owner only."""
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    """HTTP port; 0 takes any free one."""
    control_port: int = 0
    """ZeroMQ port; 0 takes the one of the last start, or any free one at the first."""
    relay: bool = True
    """Pass on, encrypted, what workers that can't reach each other send."""
    relay_port: int = 0
    """The relay's port; 0 takes the one of the last start, or any free one at the first."""
    token: str | None = None
    """Operator token to use instead of the generated one."""
    join_token: str | None = None
    """Join token to use instead of the generated one."""
    json_ready: bool = False
    """Print one JSON line when ready instead of text."""
    json_logs: bool = False
    """Everything is said as log lines in JSON on stderr, and no secret is."""
    exit_on_stdin_close: bool = False
    """Stop when standard input is closed: local mode's way to never leave a coordinator behind."""
    tls_cert: Path | None = None
    """Certificate (with its chain) and key in PEM form: HTTP becomes HTTPS."""
    tls_key: Path | None = None
    no_dashboard: bool = False
    require_token: bool = False
    """Reads need a token on loopback too: for a machine of several people, or behind a proxy."""
    topology: Topology | None = None
    """Speeds and links of the workers by name, for the scheduler; without it they go by what they measured."""
    relative_speeds: bool = False
    """The topology's speeds are relative: each worker takes that share of the speed of what is here (local mode)."""
    checkpoints_to: str | None = None
    """A URL of any kind that fsspec knows, where every checkpoint is copied to."""
    heartbeat_seconds: float = 0.25
    timing: Timing = field(default_factory=Timing)
    max_blob_bytes: int = 64 * 2**30
    max_dag_bytes: int = 256 * 2**20
    max_body_bytes: int = 16 * 2**20
