"""`fusion dag`."""

from __future__ import annotations

from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import Annotated

import typer

from fusion.cli.options import JobArgument
from fusion.cli.output import note, out, show
from fusion.errors import UserError


class DagFormat(StrEnum):
    """How `fusion dag` shows an OP-DAG."""

    table = "table"
    json = "json"
    dot = "dot"
    html = "html"


def dag(
    job: JobArgument,
    format: Annotated[
        DagFormat, typer.Option("--format", envvar="FUSION_FORMAT", help="How to show it.")
    ] = DagFormat.table,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", envvar="FUSION_OUTPUT", metavar="FILE", help="Write to FILE, not to stdout."),
    ] = None,
) -> None:
    """Capture only: show a job's OP-DAG, its FLOPs and bytes."""
    from fusion.spec_file import folder_of, load_spec, placed

    spec = load_spec(job)
    from dag import views
    from fusion.submit import capture_job

    with placed(job):
        captured = capture_job(spec, folder_of(job)).dag
    if format is DagFormat.table and output is None:
        show(views.as_table(captured))
        return
    if format is DagFormat.table:
        from rich.console import Console

        written = StringIO()
        Console(file=written, width=160).print(views.as_table(captured))
        text = written.getvalue()
    else:
        text = {DagFormat.json: views.as_json, DagFormat.dot: views.as_dot, DagFormat.html: views.as_html}[format](
            captured
        )
    if output is None:
        out(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"-o {output}: can't be written: {error.strerror or error}") from None
    note(f"wrote {output}")
