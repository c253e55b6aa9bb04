"""The cores that this process may compute on, and a name for them that workers of one machine have in common.

Workers may be in containers or network namespaces of their own and still share cores: the kernel they run on tells. One that is
kept to some of its cores shares them with those kept to the same ones.
"""

from __future__ import annotations

import hashlib
import math
import os
import uuid
from pathlib import Path

import psutil

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_GROUP = Path("/sys/fs/cgroup")
_QUOTA = _GROUP / "cpu.max"


def count() -> int:
    """Cores that compute at full speed at the same time: no more than the scheduler or a container's limit grants."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed = _allowed()
    if allowed:
        cores = min(cores, len(allowed))
    return max(1, math.ceil(min(cores, _quota())))


def machine() -> str:
    """The same text for all processes of this machine, until it starts again; tells nothing else of it."""
    try:
        started = _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        started = f"{uuid.getnode():x} {psutil.boot_time():.0f}"
    return _digest(started)


def shared_by(device: str = "") -> str:
    """The same text for all workers on the same cores of this machine, or on the same `device` of it."""
    # A limit is one container's alone, and so are the cores that it grants.
    own = f" {_GROUP.stat().st_ino}" if not device and _quota() < math.inf else ""
    return _digest(f"{machine()} {device or _allowed()}{own}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _allowed() -> list[int]:
    """Numbers of the cores that this process is kept to; empty where the system has no such thing."""
    affinity = getattr(os, "sched_getaffinity", None)
    return sorted(affinity(0)) if affinity is not None else []


def _quota() -> float:
    """Cores' worth of time that a container may take; infinite without a limit."""
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return float(quota) / float(period) if quota != "max" else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
