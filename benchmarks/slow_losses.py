"""The losses that the plans measured by `slow_network.py` lead to: 300 steps of each, in one process and without a network.

The same plan gives the same bits, so these are the losses that the pool would have had, had it gone on; the steps that it did
take are compared with them. Plans without a lossy codec share one run.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks import loss_curves, slow_jobs
from benchmarks.common import RESULTS, write_text
from benchmarks.one_process import OneProcess, Step
from benchmarks.rows_file import RowsFile
from benchmarks.slow_rows import Row, measured
from fusion.plan import Plan

STEPS = 300
_COMPARED = 100
"""First losses that are kept as they were, for comparison."""
_FILE = RESULTS / "slow_network_losses.json"


def recorded_losses() -> RowsFile:
    """What is there, to be shown: whatever the text and the torch of the interpreter that shows it."""
    return RowsFile(_FILE, {"steps": STEPS})


def _losses_file() -> RowsFile:
    """To add to, so with all that the losses depend on. The text is the interpreter's, and differs between Pythons."""
    with tempfile.TemporaryDirectory() as folder:
        text = hashlib.sha256(write_text(Path(folder)).read_bytes()).hexdigest()[:12]
    return RowsFile(_FILE, {"steps": STEPS, "text": text, "torch": str(torch.__version__)})


def train_all(settings: Iterable[str], models: Iterable[str], only: Iterable[str] = ("",)) -> None:
    """Run every plan that the rows have and that has not been run yet; only of rows with one of these texts in their name."""
    texts = tuple(only)
    rows = _losses_file()
    with tempfile.TemporaryDirectory() as name:
        for model in models:
            job = slow_jobs.captured(model, slow_jobs.data_of(model, Path(name)), STEPS)
            for row in measured(settings, [model]):
                key = key_of(row)
                if not row.ours or key in rows or not any(text in row.name for text in texts):
                    continue
                began, steps = time.perf_counter(), list[Step]()
                OneProcess(job, Plan.model_validate(row.plan)).train(steps.append)
                losses = [step.loss for step in steps]
                rows.add(
                    key,
                    {
                        "loss": loss_curves.last(losses),
                        "curve": loss_curves.curve(losses),
                        "first": losses[:_COMPARED],
                        "seconds": round(time.perf_counter() - began),
                    },
                )
                print(f"{row.setting}, {row.name}: {rows[key]['loss']:.4f}", file=sys.stderr, flush=True)


def key_of(row: Row) -> str:
    """The run that has this row's losses; that of torch's rows is dense, if in another order of the samples."""
    if not row.ours:
        return f"{row.model}, dense"
    plan = Plan.model_validate(row.plan)
    lossy = any((choice.forward, choice.backward) != ("none", "none") for choice in plan.codecs.values())
    return f"{row.model}, {plan.id}" if lossy else f"{row.model}, dense"


def agrees(row: Row, rows: RowsFile) -> bool | None:
    """Whether the pool's own losses were these, bit for bit; None where nobody knows yet."""
    key = key_of(row)
    if not row.ours or key not in rows:
        return None
    compared = min(len(row.losses), _COMPARED)
    return list(row.losses[:compared]) == rows[key]["first"][:compared]
