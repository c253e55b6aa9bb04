"""The same model and micro-batches over 2 and 4 processes on loopback: ours over torch.distributed.pipelining (gloo).

`python benchmarks/pipelining.py`. torch's side cuts between blocks, an equal number for each rank, and is run under both of its
schedules; the better one counts. Ours plans by itself and may not leave a worker out. Every process has one thread.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    Sample,
    Workload,
    arguments,
    interleave,
    machine,
    ratios,
    report,
    run_child,
    seconds_per_step,
    write_text,
)
from benchmarks.pool_runs import run_ours

YARDSTICK = Workload(vocabulary=512, sequence_length=128, micro_batches=8, micro_batch=4, steps=40, warm_up=8)
SETTINGS = ((Workload(), 2), (Workload(), 4), (YARDSTICK, 4))


@dataclass(frozen=True)
class Run:
    seconds: float
    """Mean step time."""
    cpu_seconds: float
    """Processor time per step of all processes."""
    plan: dict[str, Any]


def ours(workload: Workload, text: Path, processes: int, policy: str) -> Run:
    run = run_ours(workload, text, processes, policy=policy, fragments=processes)
    return Run(seconds_per_step(run.step_seconds, workload), run.cpu_seconds, run.plan)


def theirs(workload: Workload, text: Path, processes: int, schedule: str) -> Run:
    run = run_child("torch_pipeline.py", workload.to_json(), str(text), str(processes), schedule)[schedule]
    return Run(seconds_per_step(run["step_seconds"], workload), run["cpu_seconds"], {})


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--policy", default="op-fence")
    parser.add_argument("--setting", type=int, choices=range(len(SETTINGS)), help="only this one of the settings")
    options = parser.parse_args()
    about = machine()
    rows: list[list[str]] = []
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        for workload, processes in SETTINGS if options.setting is None else [SETTINGS[options.setting]]:
            variants: dict[str, Callable[[], Run]] = {
                "ours": partial(ours, workload, text, processes, options.policy),
                "GPipe": partial(theirs, workload, text, processes, "gpipe"),
                "1F1B": partial(theirs, workload, text, processes, "1f1b"),
            }
            runs, disturbed = interleave(variants, options.rounds, options.repeats)
            seconds = {name: Sample(tuple(run.seconds for run in taken)) for name, taken in runs.items()}
            processor = {name: Sample(tuple(run.cpu_seconds for run in taken)) for name, taken in runs.items()}
            better = min(("GPipe", "1F1B"), key=lambda name: seconds[name].median)
            for figure, samples in (("ms/step", seconds), ("processor ms/step", processor)):
                ratio = ratios(samples["ours"].values, samples[better].values)
                rows.append(
                    [
                        f"{workload.describe()}, {processes} processes" if samples is seconds else "",
                        figure,
                        *(f"{samples[name].median * 1e3:.1f}" for name in variants),
                        f"{ratio.median:.2f}",
                        ratio.spread(digits=2),
                    ]
                )
            results.append(
                {
                    "workload": workload.describe(),
                    "cores_taken_by_others": disturbed,
                    "processes": processes,
                    "seconds": {name: sample.values for name, sample in seconds.items()},
                    "processor_seconds": {name: sample.values for name, sample in processor.items()},
                    "better_schedule": better,
                    "ratio": ratios(seconds["ours"].values, seconds[better].values).median,
                    "plan": runs["ours"][-1].plan,
                }
            )
    report(
        "pipelining",
        "A step over torch.distributed.pipelining",
        ["setting", "figure", "ours", "torch GPipe", "torch 1F1B", "ratio to the better", "spread"],
        rows,
        {"machine": about, "target": "ratio <= 0.9", "results": results},
    )


if __name__ == "__main__":
    main()
