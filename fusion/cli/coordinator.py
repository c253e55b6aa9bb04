"""`fusion coordinator`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fusion.cli.options import LogFormatOption, port_option
from fusion.logs import LogFormat


def coordinator(
    host: Annotated[
        str,
        typer.Option(
            "--host", envvar="FUSION_HOST", metavar="HOST", help="Address to listen on; 0.0.0.0 for other machines."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        port_option("--port", "HTTP port; 0 takes a free one.", show_default=True),
    ] = 8760,
    state: Annotated[
        Path, typer.Option("--state", envvar="FUSION_STATE", metavar="DIR", help="Folder for everything that lasts.")
    ] = Path("fusion-state"),
    control_port: Annotated[
        int,
        port_option("--control-port", "Port for the workers. Default: a free one, kept over restarts."),
    ] = 0,
    relay: Annotated[
        bool,
        typer.Option(
            "--relay/--no-relay",
            envvar="FUSION_RELAY",
            help="Pass on, encrypted, what workers that can't reach each other send.",
        ),
    ] = True,
    relay_port: Annotated[
        int,
        port_option("--relay-port", "Port for such workers. Default: a free one, kept over restarts."),
    ] = 0,
    topology: Annotated[
        Path | None,
        typer.Option(
            "--topology", envvar="FUSION_TOPOLOGY", metavar="FILE", help="Speeds and links of the workers, by name."
        ),
    ] = None,
    checkpoints_to: Annotated[
        str | None,
        typer.Option(
            "--checkpoints-to",
            envvar="FUSION_CHECKPOINTS_TO",
            metavar="URL",
            help="Copy every checkpoint there too: any URL that fsspec knows, for example s3://bucket/runs.",
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            "--token", envvar="FUSION_TOKEN", metavar="TOKEN", help="The operator's token. Default: a made one."
        ),
    ] = None,
    join_token: Annotated[
        str | None,
        typer.Option(
            "--join-token", envvar="FUSION_JOIN_TOKEN", metavar="TOKEN", help="The workers' token. Default: a made one."
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option("--tls-cert", envvar="FUSION_TLS_CERT", metavar="FILE", help="Certificate (PEM): serve HTTPS."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", envvar="FUSION_TLS_KEY", metavar="FILE", help="The certificate's key.")
    ] = None,
    require_token: Annotated[
        bool,
        typer.Option(
            "--require-token",
            envvar="FUSION_REQUIRE_TOKEN",
            help="Reads need a token on loopback too: on a machine of several people, or behind a proxy.",
        ),
    ] = False,
    log_format: LogFormatOption = LogFormat.text,
    no_dashboard: Annotated[
        bool, typer.Option("--no-dashboard", envvar="FUSION_NO_DASHBOARD", help="Serve the API only.")
    ] = False,
    local: Annotated[bool, typer.Option("--local", envvar="FUSION_LOCAL", hidden=True)] = False,
) -> None:
    """Start a coordinator. Prints the dashboard's address and the command that joins a worker."""
    from coordinator.config import CoordinatorConfig
    from coordinator.daemon import run_coordinator

    links = None
    if topology is not None:
        from fusion.topology import load_topology

        links = load_topology(topology)
    code = run_coordinator(
        CoordinatorConfig(
            state=state,
            host=host,
            port=port,
            control_port=control_port,
            relay=relay,
            relay_port=relay_port,
            checkpoints_to=checkpoints_to,
            token=token,
            join_token=join_token,
            tls_cert=tls_cert,
            tls_key=tls_key,
            require_token=require_token,
            json_ready=local,
            json_logs=log_format is LogFormat.json,
            exit_on_stdin_close=local,
            no_dashboard=no_dashboard,
            topology=links,
            relative_speeds=local,
        )
    )
    raise typer.Exit(code)
