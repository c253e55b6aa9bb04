"""Who may join the pool under which name."""

from __future__ import annotations

import secrets

from coordinator.life.lifecycle import Lifecycle
from coordinator.life.pool import Member
from fusion.errors import FusionError
from fusion.messages import JoinRequest


class NameTakenError(FusionError):
    """A worker that wants to join has a name or key that is in use."""


def admit(lifecycle: Lifecycle, request: JoinRequest, now: float) -> Member:
    """The record of a new incarnation. Raises `NameTakenError`."""
    for other in lifecycle.pool:
        if other.barred and (other.name == request.name or other.public_key == request.public_key):
            raise NameTakenError(f"worker {other.name} was evicted ({other.barred})")
    for other in lifecycle.pool.live():
        same_name, same_key = other.name == request.name, other.public_key == request.public_key
        # A name whose worker has gone quiet is free: most likely its process was killed and started again.
        quiet = other.silence(now) > lifecycle.failure_timeout(other) / 3
        if same_key and not same_name:
            raise NameTakenError(f"worker {other.name} joined with the same key; start the process again")
        if same_name and not same_key and not quiet:
            raise NameTakenError(
                f"a worker named {other.name} is in the pool (heard {now - other.last_heard:.1f} s ago); "
                "choose another --name, or stop that worker first"
            )
    return Member(
        name=request.name,
        incarnation=secrets.token_hex(8),
        device=request.device,
        endpoint=request.data_endpoint,
        public_key=request.public_key,
        fusion_version=request.fusion_version,
        torch_version=request.torch_version,
        probes=request.probes,
        relay_port=request.relay_port,
    )
