"""`fusion checkpoint ls` and `get`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fusion.cli.command import Command
from fusion.cli.connection import connect
from fusion.cli.options import CaOption, CoordinatorOption, JobIdArgument, JsonOption, TokenOption
from fusion.cli.output import clock, note, out, print_json, show, table
from fusion.client import Client
from fusion.errors import UserError
from fusion.remote_files import is_url, put, shown
from fusion.units import format_bytes

_FILE = ".safetensors"

app = typer.Typer(help="List and fetch the checkpoints of a job.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls", cls=Command)
def list_checkpoints(
    job_id: JobIdArgument,
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints of a job."""
    with connect(coordinator, token, ca) as client:
        found = client.checkpoints(job_id)
    if as_json:
        print_json(found)
    elif not found:
        out(f"job {job_id} has no checkpoint yet")
    else:
        rows = [
            (
                str(checkpoint["step"]),
                clock(checkpoint["time"]),
                format_bytes(checkpoint["model"]["size"]),
                format_bytes(checkpoint["optimizer"]["size"]),
            )
            for checkpoint in found
        ]
        show(table(None, ("step", "time", "model", "optimizer"), rows, right=("step", "model", "optimizer")))


@app.command("get", cls=Command)
def get(
    job_id: JobIdArgument,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            envvar="FUSION_OUTPUT",
            metavar="PATH",
            help="A file for the model alone, or a folder for model and optimizer (to resume from); here, or at any URL that "
            "fsspec knows (s3://bucket/run).",
        ),
    ] = "model.safetensors",
    step: Annotated[
        int | None,
        typer.Option("--step", envvar="FUSION_STEP", min=0, metavar="N", help="Which one. Default: the latest."),
    ] = None,
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
) -> None:
    """Fetch a checkpoint.

    `model.load_state_dict(safetensors.torch.load_file(FILE))` takes it as it is.
    """
    with connect(coordinator, token, ca) as client:
        steps = [int(checkpoint["step"]) for checkpoint in client.checkpoints(job_id)]
        if not steps:
            raise UserError(f"job {job_id} has no checkpoint yet")
        wanted = max(steps) if step is None else step
        if wanted not in steps:
            raise UserError(f"job {job_id} has no checkpoint of step {wanted}; it has {', '.join(map(str, steps))}")
        if is_url(output):
            _send_to(client, job_id, wanted, output)
        else:
            _write(client, job_id, wanted, Path(output))
    note(f"checkpoint of step {wanted}")
    out(shown(output) if is_url(output) else output)


def _write(client: Client, job_id: str, step: int, output: Path) -> None:
    if output.is_dir() or output.suffix != _FILE:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{output}: can't make this folder: {error.strerror or error}") from None
        for part in ("model", "optimizer"):
            client.download_checkpoint(job_id, step, part, output / f"{part}{_FILE}")
    else:
        client.download_checkpoint(job_id, step, "model", output)


def _send_to(client: Client, job_id: str, step: int, url: str) -> None:
    """By way of a file here, so that a download that breaks off leaves nothing there."""
    alone = url.endswith(_FILE)
    with tempfile.TemporaryDirectory(prefix="fusion-") as folder:
        for part in ("model",) if alone else ("model", "optimizer"):
            file = client.download_checkpoint(job_id, step, part, Path(folder) / f"{part}{_FILE}")
            put(file, url if alone else f"{url.rstrip('/')}/{file.name}")
