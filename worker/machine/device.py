"""What this machine can do: cores, memory, and how fast it computes (`worker.machine.profile`)."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path

import psutil
import torch

from fusion.errors import UserError
from fusion.messages import Device
from fusion.units import format_bytes, plural
from worker.machine import cores
from worker.machine.profile import profile

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def measure(
    device: str,
    threads: int,
    memory_limit: int | None,
    seconds: float = 0.1,
    speed: float | None = None,
    *,
    rests: bool = False,
) -> Device:
    """Describe the device, its rates measured in about `seconds`, or its `speed` as somebody declares it (FLOP/s).

    With `rests` also what these cost, for workers that rest to be as slow as a topology says.

    Raises `UserError` when there is no such device.
    """
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
    described = Device(
        kind="cuda" if target.type == "cuda" else "cpu",
        description=description,
        cores=cores.count(),
        threads=threads,
        machine=cores.machine(),
        processor=cores.shared_by(_which(target)),
        capability=_capability(target),
        memory_bytes=min(memory, memory_limit) if memory_limit else memory,
    )
    if speed is not None:
        return described.model_copy(update={"flops_per_second": speed, "declared": True})
    return described.model_copy(update=asdict(profile(target, threads, seconds, rests=rests)))


def device_in_words(device: Device) -> str:
    """The device in a few words: `cpu, 1 thread on 8 cores, 15.5 GiB, 96 GFLOP/s`."""
    threads = f"{device.threads} {plural('thread', device.threads)}"
    # Whoever lends a large machine should see at once that it computes on a part of it.
    on = f" on {device.cores} cores" if device.kind == "cpu" and device.cores > device.threads else ""
    rate = device.flops_per_second / 1e9
    return f"{device.kind}, {threads}{on}, {format_bytes(device.memory_bytes)}, {rate:.0f} GFLOP/s"


def _which(device: torch.device) -> str:
    """The GPU; empty for the processor."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def _capability(target: torch.device) -> str:
    """What torch chooses kernels by: two devices with the same one compute the same bits."""
    if target.type == "cuda":
        return ".".join(map(str, torch.cuda.get_device_capability(target)))
    return str(torch.backends.cpu.get_cpu_capability())


def _machine_memory() -> int:
    total = int(psutil.virtual_memory().total)
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
