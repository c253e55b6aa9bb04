"""What this machine can do: cores, memory, and how fast it multiplies matrices."""

from __future__ import annotations

import platform
from pathlib import Path
from time import perf_counter, thread_time

import psutil
import torch

from fusion.errors import UserError
from fusion.messages import Device

_MATRIX = 512
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def measure(device: str, threads: int, memory_limit: int | None, seconds: float = 0.1) -> Device:
    """Describe the device, its speed measured in about `seconds`. Raises `UserError` when there is no such device."""
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device!r} is no device; use cpu, cuda or cuda:N") from None
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: this torch sees no GPU; use --device cpu")
        if target.index is not None and target.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} GPU(s)")
        properties = torch.cuda.get_device_properties(target)
        memory, description = int(properties.total_memory), str(properties.name)
    elif target.type == "cpu":
        memory, description = _machine_memory(), platform.processor() or platform.machine()
    else:
        raise UserError(f"--device {device!r} is not supported; use cpu, cuda or cuda:N")
    return Device(
        kind="cuda" if target.type == "cuda" else "cpu",
        description=description,
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        threads=threads,
        memory_bytes=min(memory, memory_limit) if memory_limit else memory,
        flops_per_second=_matmul_speed(target, threads, seconds),
    )


def _machine_memory() -> int:
    total = int(psutil.virtual_memory().total)
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _matmul_speed(device: torch.device, threads: int, seconds: float) -> float:
    """Floating-point operations per second of float32 matrix products, the best of several short bursts.

    One thread's speed is counted in the processor time that it got: several workers that start at the same time on one
    machine would otherwise see each other, each differently, and a plan would take equal workers for unequal ones.
    """
    clock = thread_time if device.type == "cpu" and threads == 1 else perf_counter
    left = torch.randn(_MATRIX, _MATRIX, device=device)
    out = torch.empty_like(left)
    torch.mm(left, left, out=out)  # The first call loads kernels.
    best, deadline = 0.0, perf_counter() + seconds
    while perf_counter() < deadline or best == 0.0:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = clock()
        torch.mm(left, left, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * _MATRIX**3 / max(clock() - begin, 1e-6))
    return best
