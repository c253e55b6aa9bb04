"""`fusion worker`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fusion.cli.options import CaOption, LogFormatOption, TokenOption, port_option
from fusion.errors import UserError
from fusion.logs import LogFormat

_PROFILE_SECONDS = 1.0


def worker(
    join: Annotated[
        str,
        typer.Option("--join", envvar="FUSION_JOIN", metavar="URL", help="The coordinator's address, with its token."),
    ],
    name: Annotated[
        str | None,
        typer.Option(
            "--name", envvar="FUSION_NAME", metavar="NAME", help="Name in the pool. Default: host and process id."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", envvar="FUSION_DEVICE", metavar="D", help="cpu, cuda or cuda:N.")
    ] = "cpu",
    threads: Annotated[
        int,
        typer.Option(
            "--threads",
            envvar="FUSION_THREADS",
            min=1,
            metavar="N",
            help="Compute threads; the same on every worker of a pool.",
        ),
    ] = 1,
    memory_limit: Annotated[
        str | None,
        typer.Option("--memory-limit", envvar="FUSION_MEMORY_LIMIT", metavar="SIZE", help="For example 2GiB."),
    ] = None,
    speed: Annotated[
        str | None,
        typer.Option("--speed", envvar="FUSION_SPEED", metavar="FLOP/S", help="For example 4e11. Default: measured."),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option("--advertise", envvar="FUSION_ADVERTISE", metavar="HOST:PORT", help="Where peers reach it."),
    ] = None,
    interface: Annotated[
        str | None,
        typer.Option("--interface", envvar="FUSION_INTERFACE", metavar="NAME", help="Whose address peers use: eth0."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option("--listen", envvar="FUSION_LISTEN", metavar="HOST", help="Address to listen on.")
    ] = None,
    relay: Annotated[
        bool,
        typer.Option(
            "--relay/--no-relay",
            envvar="FUSION_RELAY",
            help="Pass on, encrypted, what workers that can't reach each other send; others must reach this one.",
        ),
    ] = False,
    relay_port: Annotated[
        int,
        port_option("--relay-port", "Port of the relay. Default: a free one."),
    ] = 0,
    pause_when_busy: Annotated[
        bool,
        typer.Option(
            "--pause-when-busy",
            envvar="FUSION_PAUSE_WHEN_BUSY",
            help="Leave the pool in good order while other programs keep the machine busy; join again when they are quiet.",
        ),
    ] = False,
    token: TokenOption = None,
    ca: CaOption = None,
    log_format: LogFormatOption = LogFormat.text,
    local: Annotated[bool, typer.Option("--local", envvar="FUSION_LOCAL", hidden=True)] = False,
    profile_seconds: Annotated[
        float, typer.Option("--profile-seconds", envvar="FUSION_PROFILE_SECONDS", min=0.01, max=60, hidden=True)
    ] = _PROFILE_SECONDS,
    topology: Annotated[
        Path | None, typer.Option("--topology", envvar="FUSION_TOPOLOGY", metavar="FILE", hidden=True)
    ] = None,
) -> None:
    """Join this machine to a pool and work until told to leave."""
    # Before torch is imported: it reads these once. Threads that spin while they wait slow their neighbours down.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fusion.units import MEMORY, parse_bytes

    try:
        limit = parse_bytes(memory_limit) if memory_limit is not None else None
    except ValueError as error:
        raise UserError(f"--memory-limit: {error}") from None
    if limit is not None and not MEMORY.holds(limit):
        raise UserError(f"--memory-limit: must be between {MEMORY.least} and {MEMORY.most}, got {memory_limit!r}")
    from fusion.topology import load_topology
    from worker.config import WorkerConfig
    from worker.daemon import run_worker

    code = run_worker(
        WorkerConfig(
            join=join,
            name=name,
            device=device,
            threads=threads,
            memory_limit=limit,
            speed=_speed(speed) if speed is not None else None,
            profile_seconds=profile_seconds,
            advertise=advertise,
            interface=interface,
            listen=listen,
            relay=relay or relay_port > 0,
            relay_port=relay_port,
            token=token,
            tls_ca=str(ca) if ca is not None else None,
            json_logs=log_format is LogFormat.json,
            exit_on_stdin_close=local,
            pause_when_busy=pause_when_busy,
            topology=load_topology(topology) if topology is not None else None,
        )
    )
    if code:
        raise typer.Exit(code)


def _speed(text: str) -> float:
    """Raises `UserError`."""
    from fusion.units import SPEED

    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not SPEED.holds(speed):
        raise UserError(
            f"--speed {text!r} is not a speed in FLOP/s between {SPEED.least} and {SPEED.most}; write it like 4e11"
        )
    return speed
