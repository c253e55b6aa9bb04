"""The tables of `slow_network.py` in Markdown, from the rows that were measured and the losses of their plans."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks import loss_curves, slow_jobs
from benchmarks.common import RESULTS
from benchmarks.rows_file import RowsFile
from benchmarks.slow_goals import Goal, goals
from benchmarks.slow_losses import STEPS, agrees, key_of, recorded_losses
from benchmarks.slow_rows import Row, measured
from benchmarks.slow_settings import HEADLINE, SETTINGS

_HEAD = (
    "step",
    "range",
    "speed-up",
    "MiB sent",
    "slowest stage",
    "busiest link",
    "over the longer",
    "predicted",
    f"loss after {STEPS} steps",
    "loss at that time",
    "others took",
)


def report(settings: Sequence[str], models: Sequence[str]) -> str:
    """Everything that is there of these settings and models; also written, merged, to `slow_network.json`."""
    curves = recorded_losses()
    rows = measured(settings, models)
    judged = list(goals(rows, lambda row: curves[key_of(row)]["loss"] if key_of(row) in curves else None))
    lines: list[str] = []
    for model in models:
        for setting in settings:
            mine = [row for row in rows if (row.model, row.setting) == (model, setting)]
            if mine:
                lines += _table(model, setting, mine, curves)
    if judged:
        lines += ["| goal | measured | wanted | met |", "|---|---|---|---|"]
        lines += [
            f"| {goal.title} | {_with_spread(goal.values)} | {'at least' if goal.at_least else 'at most'} {goal.bound:g} "
            f"| {'yes' if goal.met else '**no**'} |"
            for goal in judged
        ]
    merged = {
        "goals": [_entry(goal) for goal in judged],
        "rows": [
            asdict(row) | {"over_bound": row.over_bound, "pool_has_the_losses_of_one_process": agrees(row, curves)}
            for row in rows
        ],
    }
    (RESULTS / "slow_network.json").write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    return "\n".join(lines)


def _entry(goal: Goal) -> dict[str, Any]:
    judged = {"what": goal.title, "value": goal.value, "bound": goal.bound, "at_least": goal.at_least, "met": goal.met}
    return {**judged, "values": goal.values}


def _with_spread(values: Sequence[float]) -> str:
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{median(values):.2f}{spread}"


def _table(model: str, setting: str, rows: Sequence[Row], curves: RowsFile) -> Iterator[str]:
    theirs = min((row.seconds for row in rows if not row.ours), default=None)
    best = next((row for row in rows if row.name == f"ours: {HEADLINE.name}"), None)
    until = best.seconds * STEPS if best is not None else None
    time = "" if until is None else f"; *that time*: {until:.0f} s, in which `{HEADLINE.name}` does {STEPS} steps"
    yield f"{slow_jobs.DESCRIBED[model]}, {SETTINGS[setting].title}{time}:\n"
    yield f"| plan | {' | '.join(_HEAD)} |"
    yield "|---" * (len(_HEAD) + 1) + "|"
    for row in rows:
        yield f"| {row.name} | {' | '.join(_cells(row, theirs, until, curves))} |"
    yield ""


def _cells(row: Row, theirs: float | None, until: float | None, curves: RowsFile) -> Iterator[str]:
    """One for each of `_HEAD`; empty where nothing is known."""
    yield f"{row.seconds:.3f} s"
    yield f"{row.fastest:.2f} to {row.slowest:.2f}"
    yield "" if theirs is None else f"{theirs / row.seconds:.1f}"
    yield "" if row.sent_bytes is None else f"{row.sent_bytes / 2**20:.2f}"
    yield "" if row.stage_seconds is None else f"{row.stage_seconds:.3f} s"
    yield "" if row.link_seconds is None else f"{row.link_seconds:.3f} s"
    yield "" if row.over_bound is None else f"{row.over_bound:.2f}"
    yield "" if row.predicted is None else f"{row.predicted:.3f} s"
    key = key_of(row)
    if key in curves:
        yield f"{curves[key]['loss']:.3f}"
        reached = None if until is None else until / row.seconds
        loss = None if reached is None else loss_curves.at_step(curves[key]["curve"], reached)
        found = "none yet" if loss is None else f"{loss:.3f}"
        yield "" if reached is None else f"{found} ({min(reached, STEPS):.0f} steps)"
    else:
        yield ""
        yield ""
    yield f"{row.disturbed:g} cores"
