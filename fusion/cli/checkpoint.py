"""`fusion checkpoint ls` and `get`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusion.cli.connection import connect
from fusion.cli.options import CaOption, CoordinatorOption, JobIdArgument, JsonOption, TokenOption
from fusion.cli.output import clock, note, out, print_json, show, table
from fusion.errors import UserError
from fusion.units import format_bytes

app = typer.Typer(help="List and fetch the checkpoints of a job.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
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


@app.command("get")
def get(
    job_id: JobIdArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            envvar="FUSION_OUTPUT",
            metavar="PATH",
            help="A file for the model alone, or a folder for model and optimizer (to resume from).",
        ),
    ] = Path("model.safetensors"),
    step: Annotated[
        int | None, typer.Option("--step", envvar="FUSION_STEP", min=0, help="Which one. Default: the latest.")
    ] = None,
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
) -> None:
    """Fetch a checkpoint; `model.load_state_dict(safetensors.torch.load_file(FILE))` takes it as it is."""
    with connect(coordinator, token, ca) as client:
        steps = [int(checkpoint["step"]) for checkpoint in client.checkpoints(job_id)]
        if not steps:
            raise UserError(f"job {job_id} has no checkpoint yet")
        wanted = max(steps) if step is None else step
        if wanted not in steps:
            raise UserError(f"job {job_id} has no checkpoint of step {wanted}; it has {', '.join(map(str, steps))}")
        if output.is_dir() or output.suffix != ".safetensors":
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{output}: can't make this folder: {error.strerror or error}") from None
            for part in ("model", "optimizer"):
                client.download_checkpoint(job_id, wanted, part, output / f"{part}.safetensors")
        else:
            client.download_checkpoint(job_id, wanted, "model", output)
    note(f"checkpoint of step {wanted}")
    out(str(output))
