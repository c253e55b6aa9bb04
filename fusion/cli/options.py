"""Options that several commands share. Every flag has a `FUSION_...` environment variable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion.logs import LogFormat

CoordinatorOption = Annotated[
    str | None,
    typer.Option(
        "--coordinator",
        envvar="FUSION_COORDINATOR",
        metavar="URL",
        help="The coordinator's address. Default: the one that `fusion coordinator` of this user started.",
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option("--token", envvar="FUSION_TOKEN", metavar="TOKEN", help="The pool's token.", show_envvar=True),
]
CaOption = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        envvar="FUSION_TLS_CA",
        metavar="FILE",
        help="Certificates to trust for https, in PEM form. Default: those of this machine.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", envvar="FUSION_JSON", help="Print JSON for a program to read.")]
MetricsOption = Annotated[
    Path | None,
    typer.Option(
        "--metrics",
        envvar="FUSION_METRICS",
        metavar="FILE",
        help="Write a line of JSON per step and per event to FILE; those of steps have `loss`.",
    ),
]
TensorBoardOption = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard", envvar="FUSION_TENSORBOARD", metavar="DIR", help="Write TensorBoard's event file there."
    ),
]
LogFormatOption = Annotated[
    LogFormat,
    typer.Option("--log-format", envvar="FUSION_LOG_FORMAT", help="json: every line an object, on stderr, no secrets."),
]
JobArgument = Annotated[Path, typer.Argument(metavar="JOB", help="The job spec, a YAML file.")]


def not_empty(value: str) -> str:
    """For arguments that become a part of a URL's path."""
    if not value.strip():
        raise typer.BadParameter("it is empty.")
    return value


JobIdArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id.", callback=not_empty)]


def port_option(flag: str, words: str, *, show_default: bool = False) -> Any:
    """A port; 0 stands for a free one."""
    envvar = "FUSION_" + flag.removeprefix("--").replace("-", "_").upper()
    return typer.Option(flag, envvar=envvar, min=0, max=65535, metavar="N", help=words, show_default=show_default)
