"""`fusion workers` and `drain`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fusion.cli.connection import connect
from fusion.cli.links import links_table
from fusion.cli.options import CaOption, CoordinatorOption, JsonOption, TokenOption, not_empty
from fusion.cli.output import out, print_json, show, table
from fusion.units import format_bytes


def workers(
    links: Annotated[
        bool, typer.Option("--links", envvar="FUSION_LINKS", help="The links between them: bandwidth and latency.")
    ] = False,
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the workers of a pool, or the links between them."""
    with connect(coordinator, token, ca) as client:
        found = client.workers()
        url = client.url
        between = client.links() if links else []
    if links:
        _show_links([worker["name"] for worker in found if worker["state"] != "lost"], between, as_json)
        return
    if as_json:
        print_json(found)
    elif not found:
        out(f"no workers at {url}; `fusion token create --role join` prints the command that adds one")
    else:
        columns = (
            "name",
            "state",
            "job",
            "fragments",
            "device",
            "threads",
            "speed",
            "memory rate",
            "memory",
            "endpoint",
        )
        right = ("threads", "speed", "memory rate", "memory")
        least = ("endpoint", "memory rate", "device", "threads", "memory", "speed")
        show(table(None, columns, [_row(worker) for worker in found], right=right, least=least))


def _show_links(workers: list[str], links: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(links)
    elif not links:
        out("no link has been measured: idle workers measure theirs a second after they have joined")
    else:
        show(links_table(list(dict.fromkeys([*workers, *(link["from"] for link in links)])), links))


def _row(worker: dict[str, Any]) -> tuple[str, ...]:
    device = worker["device"]
    return (
        str(worker["name"]),
        str(worker["state"]),
        str(worker["job"] or "-"),
        ", ".join(str(fragment) for fragment in worker["fragments"]) or "-",
        str(device["description"] or device["kind"]),
        str(device["threads"]),
        _speed(device),
        f"{device['bytes_per_second'] / 1e9:.1f} GB/s" if device.get("bytes_per_second") else "-",
        f"{format_bytes(worker['memory_used_bytes'])} / {format_bytes(device['memory_bytes'])}",
        str(worker["endpoint"]),
    )


def _speed(device: dict[str, Any]) -> str:
    """In GFLOP/s: of matrix products and of convolutions, or as declared."""
    if not device.get("flops_per_second"):
        return "-"
    speed = f"{device['flops_per_second'] / 1e9:,.0f}"
    if device.get("declared"):
        return f"{speed} GFLOP/s (declared)"
    convolutions = device.get("convolution_flops_per_second")
    return f"{speed} / {convolutions / 1e9:,.0f} GFLOP/s" if convolutions else f"{speed} GFLOP/s"


def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="The worker's name.", callback=not_empty)],
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a worker to leave in good order."""
    with connect(coordinator, token, ca) as client:
        drained = client.drain(worker)
    if as_json:
        print_json(drained)
    else:
        out(f"worker {worker} {drained.get('state', 'draining')}")
