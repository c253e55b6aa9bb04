"""Who may join the pool under which name."""

from __future__ import annotations

import math
import secrets

from coordinator.life.lifecycle import Lifecycle
from coordinator.life.pool import Member
from fusion.errors import FusionError
from fusion.messages import JoinRequest


class NameTakenError(FusionError):
    """A worker that wants to join has a name or key that is in use."""


class NameAskedForError(NameTakenError):
    """The name's holder may be gone, which is being looked into: whoever wants it may ask again in a moment."""


def holder(lifecycle: Lifecycle, request: JoinRequest) -> Member | None:
    """Another process that is in the pool under the name that is asked for."""
    found = lifecycle.pool.get(request.name)
    return found if found is not None and found.live and found.public_key != request.public_key else None


def admit(lifecycle: Lifecycle, request: JoinRequest, now: float) -> Member:
    """The record of a new incarnation. Raises `NameTakenError` or `NameAskedForError`."""
    for other in lifecycle.pool:
        if other.barred and (other.name == request.name or other.public_key == request.public_key):
            raise NameTakenError(f"worker {other.name} was evicted ({other.barred})")
    for other in lifecycle.pool.live():
        same_name, same_key = other.name == request.name, other.public_key == request.public_key
        if same_key and not same_name:
            raise NameTakenError(f"worker {other.name} joined with the same key; start the process again")
        if same_name and not same_key:
            _refuse_unless_quiet(lifecycle, other, now)
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


def _refuse_unless_quiet(lifecycle: Lifecycle, other: Member, now: float) -> None:
    """A name whose worker has gone quiet is free: most likely its process was killed and started again."""
    free_in = lifecycle.failure_timeout(other) / 3 - other.silence(now)
    if free_in < 0:
        return
    if lifecycle.lives(other, now):
        raise NameTakenError(
            f"a worker named {other.name} is in the pool (heard {now - other.last_heard:.1f} s ago); "
            "choose another --name, or stop that worker first"
        )
    raise NameAskedForError(
        f"a worker named {other.name} is in the pool, but silent; if it is gone, "
        f"its name is free in {math.floor(free_in) + 1} s at the latest"
    )
