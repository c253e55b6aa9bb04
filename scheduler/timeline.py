"""Draws a simulated step: Chrome trace JSON (chrome://tracing, Perfetto) and a self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from fusion.units import format_bytes, format_seconds
from scheduler.simulator import Simulation, Span

_COLORS = {
    "forward": "#4c78a8",
    "backward": "#72b7b2",
    "update": "#b279a2",
    "activation": "#f2a65a",
    "gradient": "#e4785a",
    "parameter": "#9d755d",
    "norms": "#bab0ac",
}
_ROW, _LEFT, _WIDTH = 26, 170, 1200


def chrome_trace(simulation: Simulation) -> str:
    """Trace events in microseconds: one process for workers, one for links, a thread for each resource."""
    events: list[dict[str, Any]] = []
    rows = {name: number for number, name in enumerate(resources(simulation.spans))}
    for name, row in rows.items():
        process = 2 if "→" in name else 1
        events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": row, "args": {"name": name}})
    for process, name in ((1, "workers"), (2, "links")):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}})
    for span in simulation.spans:
        events.append(
            {
                "ph": "X",
                "name": _label(span),
                "cat": span.kind,
                "pid": 2 if "→" in span.resource else 1,
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


def resources(spans: Sequence[Span]) -> list[str]:
    """Workers in order of their first task, then links in order of their first message."""
    names = dict.fromkeys(span.resource for span in spans)
    return [name for name in names if "→" not in name] + [name for name in names if "→" in name]


def html(simulation: Simulation, title: str = "Pipeline") -> str:
    """A page with one bar per task and message; hover tells what it is. Nothing is loaded from elsewhere."""
    spans, rows = simulation.spans, resources(simulation.spans)
    end = max((span.end for span in spans), default=0.0) or 1.0
    scale = _WIDTH / end
    height = _ROW * (len(rows) + 1) + 10
    bars = []
    for row, name in enumerate(rows):
        top = row * _ROW + 4
        bars.append(f'<text x="4" y="{top + 15}" class="name">{escape(name)}</text>')
        bars.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{top + 21}" y2="{top + 21}" class="line"/>')
    index = {name: row for row, name in enumerate(rows)}
    for span in spans:
        left, width = _LEFT + span.start * scale, max((span.end - span.start) * scale, 0.5)
        top = index[span.resource] * _ROW + 4
        tip = f"{_label(span)}, step {span.step}: {format_seconds(span.start)} + {(span.end - span.start) * 1e3:.3g} ms"
        if span.size:
            tip += f", {format_bytes(span.size)}"
        text = (
            f'<text x="{left + width / 2:.2f}" y="{top + 14}" class="number">{span.micro_batch}</text>'
            if width > 12 and span.kind in ("forward", "backward")
            else ""
        )
        bars.append(
            f'<g><title>{escape(tip)}</title><rect x="{left:.2f}" y="{top}" width="{width:.2f}" height="20" '
            f'fill="{_COLORS[span.kind]}"/>{text}</g>'
        )
    for tick in range(11):
        x = _LEFT + _WIDTH * tick / 10
        bars.append(f'<text x="{x:.1f}" y="{height - 8}" class="tick">{end * tick / 10 * 1e3:.4g} ms</text>')
    legend = " ".join(f'<span style="background:{color}">{kind}</span>' for kind, color in _COLORS.items())
    summary = (
        f"{simulation.step_seconds * 1e3:.4g} ms per step in steady state, bubble {simulation.bubble:.1%}, "
        f"{format_bytes(simulation.bytes_per_step)} on the wire per step"
    )
    return _PAGE.format(
        title=escape(title),
        summary=escape(summary),
        legend=legend,
        width=_LEFT + _WIDTH + 60,
        height=height,
        bars="\n".join(bars),
    )


def _label(span: Span) -> str:
    if "→" in span.resource:
        return f"{span.kind} {span.micro_batch} for fragment {span.fragment}"
    return f"{span.kind} {span.micro_batch} of fragment {span.fragment}"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff }}
.legend span {{ padding: 2px 8px; border-radius: 3px; color: #fff; font-size: 12px }}
.drawing {{ overflow-x: auto; margin-top: 1rem }}
.name {{ font-size: 12px }} .number {{ font-size: 10px; fill: #fff; text-anchor: middle; pointer-events: none }}
.tick {{ font-size: 10px; fill: #666; text-anchor: middle }} .line {{ stroke: #ddd }}
</style></head><body>
<h1>{title}</h1><p>{summary}</p><p class="legend">{legend}</p>
<div class="drawing"><svg width="{width}" height="{height}" role="img" aria-label="{title}">
{bars}
</svg></div></body></html>
"""
