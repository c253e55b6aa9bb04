"""The links between workers as people look at them: a matrix, or a list where that would be too wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fusion.cli.output import table
from fusion.units import format_rate, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

_WIDEST = 8
"""Workers of which a matrix is drawn."""


def links_table(workers: Sequence[str], links: Sequence[dict[str, Any]]) -> Table:
    """From each worker (row) to each other (column)."""
    if len(workers) > _WIDEST:
        columns = ("from", "to", "link", "known by")
        return table(None, columns, [(link["from"], link["to"], _figures(link), _source(link)) for link in links])
    known = {(link["from"], link["to"]): link for link in links}

    def cell(sender: str, receiver: str) -> str:
        link = known.get((sender, receiver))
        if link is None:
            return "" if sender == receiver else "?"
        return f"{_figures(link)}\n{_source(link)}"

    rows = [(sender, *(cell(sender, receiver) for receiver in workers)) for sender in workers]
    return table(None, ("from \\ to", *workers), rows)


def _figures(link: dict[str, Any]) -> str:
    if link["error"]:
        return f"failed: {link['error']}"
    latency = "?" if link["seconds"] is None else _latency(link["seconds"])
    rate = "?" if link["bytes_per_second"] is None else format_rate(link["bytes_per_second"])
    return f"{rate}, {latency}"


def _latency(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.1 else format_seconds(seconds)


def _source(link: dict[str, Any]) -> str:
    relayed = f"relayed over {link['relay']}, " if link.get("relay") else ""
    if link["source"] == "declared":
        return f"{relayed}declared"
    if link["bytes_per_second"] is None and not link["error"]:
        return f"{relayed}not measured"
    return f"{relayed}{link['source']}, {format_seconds(link['age_seconds'])} ago"
