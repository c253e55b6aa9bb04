"""A GPT step through one worker over the same step in a plain PyTorch loop: time and peak memory.

`python benchmarks/overhead.py`. Both sides are a fresh process with one thread per run, runs alternate. The worker's peak memory
is that of its process, with everything a daemon needs; the loop's is that of a process which imports torch alone. Processor time counts
the coordinator too.
"""

from __future__ import annotations

import sys
import tempfile
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
from benchmarks.pool_runs import OurRun, run_ours

WORKLOADS = (
    Workload(),
    Workload(layers=6, width=256, sequence_length=128, micro_batch=4, steps=30, warm_up=6),
)


def plain(workload: Workload, text: Path) -> dict[str, Any]:
    return run_child("plain_loop.py", workload.to_json(), str(text))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--setting", type=int, choices=range(len(WORKLOADS)), help="only this one of the settings")
    options = parser.parse_args()
    about = machine()
    rows: list[list[str]] = []
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        for workload in WORKLOADS if options.setting is None else [WORKLOADS[options.setting]]:
            variants = {"ours": partial(run_ours, workload, text, 1), "plain": partial(plain, workload, text)}
            runs, disturbed = interleave(variants, options.rounds, options.repeats)
            ours: list[OurRun] = runs["ours"]
            our_seconds = Sample(tuple(seconds_per_step(run.step_seconds, workload) for run in ours))
            plain_seconds = Sample(tuple(seconds_per_step(run["step_seconds"], workload) for run in runs["plain"]))
            our_peak = Sample(tuple(float(max(run.peak_bytes.values())) for run in ours))
            plain_peak = Sample(tuple(float(run["peak_bytes"]) for run in runs["plain"]))
            time_ratio = ratios(our_seconds.values, plain_seconds.values)
            our_cpu = Sample(tuple(run.cpu_seconds for run in ours))
            plain_cpu = Sample(tuple(float(run["cpu_seconds"]) for run in runs["plain"]))
            cpu_ratio = ratios(our_cpu.values, plain_cpu.values)
            memory_ratio = ratios(our_peak.values, plain_peak.values)
            rows += [
                [
                    workload.describe(),
                    "ms/step",
                    f"{our_seconds.median * 1e3:.1f}",
                    f"{plain_seconds.median * 1e3:.1f}",
                    f"{time_ratio.median:.3f}",
                    time_ratio.spread(digits=3),
                ],
                [
                    "",
                    "processor ms/step",
                    f"{our_cpu.median * 1e3:.1f}",
                    f"{plain_cpu.median * 1e3:.1f}",
                    f"{cpu_ratio.median:.3f}",
                    cpu_ratio.spread(digits=3),
                ],
                [
                    "",
                    "peak MiB",
                    f"{our_peak.median / 2**20:.0f}",
                    f"{plain_peak.median / 2**20:.0f}",
                    f"{memory_ratio.median:.3f}",
                    memory_ratio.spread(digits=3),
                ],
            ]
            results.append(
                {
                    "workload": workload.describe(),
                    "cores_taken_by_others": disturbed,
                    "ours_seconds": our_seconds.values,
                    "plain_seconds": plain_seconds.values,
                    "time_ratio": time_ratio.median,
                    "ours_processor_seconds": our_cpu.values,
                    "plain_processor_seconds": plain_cpu.values,
                    "ours_peak_bytes": our_peak.values,
                    "plain_peak_bytes": plain_peak.values,
                    "memory_ratio": memory_ratio.median,
                }
            )
    report(
        "overhead",
        "One worker over a plain PyTorch loop",
        ["workload", "figure", "worker", "plain loop", "ratio", "spread"],
        rows,
        {"machine": about, "target": "time ratio <= 1.05, memory ratio <= 1.2", "results": results},
    )


if __name__ == "__main__":
    main()
