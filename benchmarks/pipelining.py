"""The same model and micro-batches over 2 and 4 processes on loopback: ours over torch.distributed.pipelining (gloo).

`python benchmarks/pipelining.py`. torch's side cuts between blocks, an equal number for each rank, and is run under both of its
schedules; the better one counts. Ours plans by itself and may not leave a worker out. Every process has one thread.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import (
    OurRun,
    Sample,
    Workload,
    arguments,
    interleave,
    machine,
    ratios,
    report,
    run_child,
    run_ours,
    seconds_per_step,
    write_text,
)

YARDSTICK = Workload(vocabulary=512, sequence_length=128, micro_batches=8, micro_batch=4, steps=40, warm_up=8)
SETTINGS = ((Workload(), 2), (Workload(), 4), (YARDSTICK, 4))


def theirs(workload: Workload, text: Path, processes: int, schedule: str) -> float:
    run = run_child("torch_pipeline.py", workload.to_json(), str(text), str(processes), schedule)
    return seconds_per_step(run["step_seconds"], workload)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--policy", default="op-fence")
    options = parser.parse_args()
    about = machine()
    rows: list[list[str]] = []
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        for workload, processes in SETTINGS:
            variants: dict[str, Any] = {
                "ours": partial(run_ours, workload, text, processes, policy=options.policy, fragments=processes),
                "GPipe": partial(theirs, workload, text, processes, "gpipe"),
                "1F1B": partial(theirs, workload, text, processes, "1f1b"),
            }
            runs, disturbed = interleave(variants, options.rounds, options.repeats)
            our_runs: list[OurRun] = runs["ours"]
            ours = Sample(tuple(seconds_per_step(run.step_seconds, workload) for run in our_runs))
            schedules = {name: Sample(tuple(runs[name])) for name in ("GPipe", "1F1B")}
            better = min(schedules, key=lambda name: schedules[name].median)
            ratio = ratios(ours.values, schedules[better].values)
            rows.append(
                [
                    f"{workload.describe()}, {processes} processes",
                    f"{ours.median * 1e3:.1f}",
                    *(f"{sample.median * 1e3:.1f}" for sample in schedules.values()),
                    f"{ratio.median:.2f}",
                    ratio.spread(digits=2),
                ]
            )
            results.append(
                {
                    "workload": workload.describe(),
                    "cores_taken_by_others": disturbed,
                    "processes": processes,
                    "ours_seconds": ours.values,
                    **{f"{name}_seconds": sample.values for name, sample in schedules.items()},
                    "better_schedule": better,
                    "ratio": ratio.median,
                    "ratios": ratio.values,
                    "plan": our_runs[-1].plan,
                }
            )
    report(
        "pipelining",
        "A step over torch.distributed.pipelining (ms)",
        ["setting", "ours", "torch GPipe", "torch 1F1B", "ratio to the better", "spread"],
        rows,
        {"machine": about, "target": "ratio <= 0.9", "results": results},
    )


if __name__ == "__main__":
    main()
