"""What a plan would do on a topology: the scheduler's comparison as tables, and files with a simulated step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dag.cut import cut
from dag.graph import OpDag
from fusion.cli.output import note, table
from fusion.errors import UserError
from fusion.plan import Plan
from fusion.spec import JobSpec
from fusion.units import format_bytes, format_seconds, plural
from scheduler import Simulation, Training, chrome_trace, html

if TYPE_CHECKING:
    from rich.table import Table

Prediction = Mapping[str, Any]
MOST_SHOWN = 8
"""Fragments whose workers a row of the comparison names."""
TIMELINES = {".html": "a page to look at", ".json": "a trace for Perfetto or chrome://tracing"}


def training_of(spec: JobSpec) -> Training:
    """What the job asks of a plan."""
    train = spec.train
    return Training(
        micro_batches=train.micro_batches,
        schedule=spec.plan.schedule,
        optimizer=train.optimizer,
        recompute=train.recompute,
        clip=train.clip_grad_norm is not None,
        fragments=spec.plan.fragments,
        ratio=spec.compression.ratio,
        workers=spec.plan.workers,
        seed=train.seed,
    )


def fragments(dag: OpDag, plan: Plan) -> list[dict[str, Any]]:
    """The plan's fragments, as `fusion job` shows them."""
    bounds = (0, *plan.cuts, len(dag.body))
    found = []
    for fragment, worker in zip(cut(dag, plan.cuts).fragments, plan.placement, strict=True):
        body = dag.body[bounds[fragment.index] : bounds[fragment.index + 1]]
        modules = [dag.ops[op].module for op in body if dag.ops[op].module] or [""]
        found.append(
            {
                "index": fragment.index,
                "worker": worker,
                "ops": len(body),
                "first_module": modules[0],
                "last_module": modules[-1],
                "parameters": sum(dag.ops[op].meta.elements for op in fragment.parameters),
                "parameter_bytes": sum(dag.ops[op].output_bytes for op in fragment.parameters),
                "flops": sum(dag.ops[op].flops for op in fragment.ops),
                "backward_flops": sum(dag.ops[op].backward_flops for op in fragment.ops),
            }
        )
    return found


def comparison_table(predictions: Sequence[Prediction]) -> Table:
    """One row per policy and codec, the fastest first."""
    rows = []
    for prediction in sorted(predictions, key=lambda found: found["step_seconds"] or float("inf")):
        name = (prediction["policy"], prediction["codec"])
        if prediction["reason"]:
            rows.append((*name, *"------", prediction["reason"]))
            continue
        links: Mapping[str, float] = prediction["bytes_per_link"]
        rows.append(
            (
                *name,
                format_seconds(prediction["step_seconds"]),
                f"{prediction['speedup']:.2f}" if prediction["speedup"] else "",
                f"{prediction['bubble']:.0%}",
                format_bytes(sum(links.values())),
                f"{prediction['wire_ratio']:.1f}",
                format_bytes(max(prediction["memory_per_worker"].values())),
                _short(prediction["placement"]),
            )
        )
    right = ("step", "speed-up", "idle", "sent per step", "ratio", "largest memory")
    return table(None, ("policy", "codec", *right, "placement"), rows, right=right)


def remark(predictions: Sequence[Prediction]) -> str | None:
    """What a reader of the comparison should know of how it was made."""
    short = {prediction["policy"] for prediction in predictions if prediction["simulated_steps"] == 1}
    if not short:
        return None
    return (
        f"of {', '.join(sorted(short))} one step was simulated, as its pipelines are long; filling them is part of it"
    )


def _short(placement: Sequence[str]) -> str:
    if len(placement) <= MOST_SHOWN:
        return " ".join(placement)
    count = len(set(placement))
    return f"{' '.join(placement[:3])} ... {placement[-1]} ({len(placement)} fragments on {count} {plural('worker', count)})"


def links_table(prediction: Prediction) -> Table:
    """Bytes of one step over each link, and what compresses them."""
    chosen = prediction["codecs_per_link"]
    rows = []
    for link, size in prediction["bytes_per_link"].items():
        source, _, target = link.partition(" -> ")
        there, back = chosen.get(link), chosen.get(f"{target} -> {source}")
        codecs = [found[way] for found, way in ((there, "forward"), (back, "backward")) if found]
        nominal = next(
            (f"{found['nominal_ratio']:.1f}" for found in (there, back) if found and found["nominal_ratio"]), ""
        )
        wire = next((f"{found['wire_ratio']:.1f}" for found in (there, back) if found), "")
        rows.append((link, format_bytes(size), ", ".join(codecs), nominal, wire))
    right = ("sent per step", "ratio asked", "ratio on the wire")
    return table(None, ("link", "sent per step", "codec", *right[1:]), rows, right=right)


def memory_table(prediction: Prediction) -> Table:
    """What training takes on each worker."""
    rows = [(name, format_bytes(size)) for name, size in prediction["memory_per_worker"].items()]
    return table(None, ("worker", "memory"), rows, right=("memory",))


def check_timeline(path: Path) -> None:
    """Raises `UserError` unless the file's name says what to draw."""
    if path.suffix not in TIMELINES:
        kinds = " or ".join(f"{suffix} ({what})" for suffix, what in TIMELINES.items())
        raise UserError(f"--timeline {path}: its name must end in {kinds}")


def write_timeline(path: Path, simulation: Simulation, title: str) -> None:
    """Draw the simulated steps, in the form that the file's name asks for."""
    text = html(simulation, title) if path.suffix == ".html" else chrome_trace(simulation)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--timeline {path}: can't be written: {error.strerror or error}") from None
    note(f"wrote {path}")
