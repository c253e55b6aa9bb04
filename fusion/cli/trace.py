"""A job's timeline as Chrome trace JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.units import plural

_TASKS = {"forward": "F", "backward": "B", "weights": "W", "update": "U", "evaluate": "E"}


def chrome_trace(timeline: dict[str, Any]) -> str:
    """A process for each worker, with a thread for its tasks and one for what arrives; times in microseconds."""
    process = {name: number for number, name in enumerate(timeline["workers"], 1)}
    events: list[dict[str, Any]] = []
    for name, number in process.items():
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}})
        for thread, title in ((1, "tasks"), (2, "arriving")):
            events.append({"ph": "M", "name": "thread_name", "pid": number, "tid": thread, "args": {"name": title}})
    for span in timeline["spans"]:
        task = span["kind"] in _TASKS
        begin = {
            "name": f"{_TASKS[span['kind']] if task else span['kind']} {span['micro_batch']} of fragment {span['fragment']}",
            "cat": span["kind"],
            "pid": process[span["worker"]],
            "ts": round(span["begin"] * 1e6, 3),
            "args": {key: span[key] for key in ("step", "fragment", "micro_batch", "sender") if span[key] is not None},
        }
        length = round((span["end"] - span["begin"]) * 1e6, 3)
        if task:
            events.append({**begin, "ph": "X", "tid": 1, "dur": length})
        else:  # Transfers may overlap, which the slices of one thread must not.
            same = {"tid": 2, "id": len(events)}
            events.append({**begin, **same, "ph": "b"})
            events.append({**begin, **same, "ph": "e", "ts": round(begin["ts"] + length, 3)})
    for step in timeline["steps"]:
        events.append(
            {
                "ph": "i",
                "s": "g",
                "name": f"step {step['step']}",
                "pid": 1,
                "tid": 1,
                "ts": round(step["begin"] * 1e6, 3),
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def write_trace(timeline: dict[str, Any], target: Path) -> str:
    """Write the trace file; returns what to tell the person who asked. Raises `UserError`."""
    steps = [str(step["step"]) for step in timeline["steps"]]
    if not steps:
        raise UserError(
            "no step of this job has been traced since the coordinator was started; ask again when it has run a step"
        )
    try:
        target.write_text(chrome_trace(timeline), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target}: can't write the timeline: {error.strerror or error}") from None
    return f"wrote {plural('step', len(steps))} {' and '.join(steps)} to {target}; open it at https://ui.perfetto.dev"
