"""Draws simulated steps: Chrome trace JSON (chrome://tracing, Perfetto) and a self-contained HTML page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from fusion.units import format_bytes, format_seconds
from scheduler.simulation import Simulation, Span
from scheduler.timeline_page import PAGE

_COLORS = {
    "forward": "#4c78a8",
    "backward": "#3f8f8a",
    "weights": "#6b8e3d",
    "update": "#b279a2",
    "activation": "#d9822b",
    "gradient": "#c9523c",
    "parameter": "#9d755d",
    "norms": "#8c8681",
    "encode": "#7a6fb0",
    "decode": "#5f8f3e",
    "idle": "#f0f0f0",
}
_COMPUTE = ("forward", "backward", "weights", "update")


def chrome_trace(simulation: Simulation) -> str:
    """Trace events in microseconds: one process for workers, one for links, one for codecs, a thread for each resource."""
    events: list[dict[str, Any]] = []
    processes = {1: "workers", 2: "links", 3: "codecs"}
    rows = {name: number for number, name in enumerate(resources(simulation.spans))}
    process = {span.resource: _process(span) for span in simulation.spans}
    for name, row in rows.items():
        events.append({"ph": "M", "name": "thread_name", "pid": process[name], "tid": row, "args": {"name": name}})
    for number, name in processes.items():
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}})
    for span in simulation.spans:
        events.append(
            {
                "ph": "X",
                "name": _label(span),
                "cat": span.kind,
                "pid": process[span.resource],
                "tid": rows[span.resource],
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {
                    "fragment": span.fragment,
                    "step": span.step,
                    "micro_batch": span.micro_batch,
                    "bytes": span.size,
                },
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _process(span: Span) -> int:
    return 1 if span.kind in _COMPUTE else 3 if span.kind in ("encode", "decode") else 2


def resources(spans: Sequence[Span]) -> list[str]:
    """Workers in order of their first task, then links in order of their first message, then encoders and decoders."""
    first: dict[str, int] = {}
    for span in spans:
        first.setdefault(span.resource, _process(span))
    return sorted(first, key=lambda name: first[name])


def html(simulation: Simulation, title: str = "Pipeline") -> str:
    """A page to pan and zoom, with one bar for each task and message and the idle time of each worker."""
    spans, rows = simulation.spans, resources(simulation.spans)
    index = {name: row for row, name in enumerate(rows)}
    ends: dict[int, float] = {}
    for span in spans:
        if span.kind in _COMPUTE:
            ends[span.step] = max(ends.get(span.step, 0.0), span.end)
    data = {
        "rows": rows,
        "workers": len({span.resource for span in spans if span.kind in _COMPUTE}),
        "end": max((span.end for span in spans), default=1.0) or 1.0,
        "ends": [ends[step] for step in sorted(ends)],
        "colors": _COLORS,
        "spans": [
            [
                index[span.resource],
                span.kind,
                str(span.micro_batch) if span.kind in ("forward", "backward", "weights") else "",
                span.start,
                span.end,
                _tip(span),
            ]
            for span in spans
        ],
    }
    summary = (
        f"{format_seconds(simulation.step_seconds)} per step in steady state, workers idle {simulation.bubble:.1%} of it, "
        f"{format_bytes(simulation.bytes_per_step)} on the wire per step"
    )
    dark = "color:#fff;background:"
    legend = "".join(
        f'<span style="{dark if kind != "idle" else "background:"}{color}">{kind}</span>'
        for kind, color in _COLORS.items()
        if kind == "idle" or any(span.kind == kind for span in spans)
    )
    parts = {
        "title": escape(title),
        "summary": escape(summary),
        "legend": legend,
        "table": _table(simulation),
        # No text may end the script element early.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"@(\w+)@", lambda found: parts[found[1]], PAGE)


def _table(simulation: Simulation) -> str:
    """Seconds of each kind of task in a step, and what is left."""
    steps = max((span.step for span in simulation.spans), default=1)
    rows = []
    for worker, busy in simulation.busy_per_worker.items():
        mine = [span for span in simulation.spans if span.resource == worker]
        seconds = [sum(span.end - span.start for span in mine if span.kind == kind) / steps for kind in _COMPUTE]
        idle = max(0.0, simulation.step_seconds - busy)
        share = idle / simulation.step_seconds if simulation.step_seconds else 0.0
        held = format_bytes(simulation.memory_per_worker.get(worker, 0.0))
        cells = [escape(worker), *(_precise(amount) for amount in (*seconds, idle)), f"{share:.0%}", held]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    titles = ("worker", *_COMPUTE, "idle", "idle share", "memory")
    heading = "".join(f"<th>{name}</th>" for name in titles)
    return f"<table><tr>{heading}</tr>{''.join(rows)}</table>"


def _tip(span: Span) -> str:
    text = f"{_label(span)}, step {span.step}: at {_precise(span.start)} for {_precise(span.end - span.start)}"
    return f"{text}, {format_bytes(span.size)}" if span.size else text


def _precise(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _label(span: Span) -> str:
    if span.kind in _COMPUTE:
        return f"{span.kind} {span.micro_batch} of fragment {span.fragment}"
    return f"{span.kind} {span.micro_batch} for fragment {span.fragment}"
