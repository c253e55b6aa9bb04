"""What backups and replay logs cost while nothing goes wrong: a step with them, at default settings, over one without.

`python benchmarks/backup_overhead.py`. One pool trains the same job again and again, in turn with and without: without, the
workers keep no log and ignore the orders to take snapshots. The processes are the same, the losses too. The pool is on
loopback, or with `--link MBIT`, as root, on links of so many Mbit/s, where snapshots also hold up what else is to be sent.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import shaping
from benchmarks.common import (
    ONE_THREAD,
    Sample,
    Workload,
    arguments,
    interleave,
    machine,
    ratios,
    report,
    seconds_per_step,
    write_text,
)
from benchmarks.placed_pool import PlacedPool
from benchmarks.placed_worker import BARE
from benchmarks.pool_runs import ProcessorTime, train_on
from benchmarks.shaped_pool import shaped_pool
from benchmarks.slow_jobs import YARDSTICK
from fusion.submit import CapturedJob, capture_job, read_job

BOUND = 1.03
SETTINGS = (
    (Workload(steps=150, warm_up=30), 2),
    (Workload(steps=150, warm_up=30), 4),
    (Workload(layers=6, width=256, sequence_length=128, micro_batch=4, steps=40, warm_up=8), 2),
    (replace(YARDSTICK, steps=80, warm_up=20), 4),
)
"""The last one is what `slow_network.py` trains."""


@dataclass(frozen=True)
class Run:
    seconds: float
    """Mean step time."""
    cpu_seconds: float
    """Processor time per step of all processes."""
    last_loss: float
    snapshot_step: int
    """The last common snapshot."""


def train(pool: PlacedPool, job: CapturedJob, workload: Workload, bare: bool) -> Run:
    pool.switch(BARE, bare)
    processor = ProcessorTime(pool, workload)
    common = 0

    def listen(item: Any) -> None:
        nonlocal common
        if item.kind == "job":
            common = max(common, int(item.data.get("common_step") or 0))
        processor.take(item)

    steps, _ = train_on(pool, job, listen)
    return Run(
        seconds_per_step([step["step_seconds"] for step in steps], workload),
        processor.per_step,
        steps[-1]["loss"],
        common,
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--setting", type=int, choices=range(len(SETTINGS)), help="only this one of the settings")
    parser.add_argument("--link", type=float, metavar="MBIT", help="rate of every worker's link, in Mbit/s")
    parser.add_argument("--codec", default="none", help="of activations and gradients (default: %(default)s)")
    parser.add_argument("--policy", help="how the model is cut (default: equal-compute, with a lossy codec equal-ops)")
    parser.add_argument("--every", type=int, metavar="STEPS", help="steps between backups (default: the job's, auto)")
    parser.add_argument("--steps", type=int, help="of each run, a fifth of them uncounted")
    parser.add_argument(
        "--warm-up", type=int, metavar="STEPS", help="so many are uncounted instead; the first rounds come early"
    )
    parser.add_argument("--width", type=int, help="of the model")
    options = parser.parse_args()
    rate = None if options.link is None else options.link * 1e6
    if rate is not None and (missing := shaping.unavailable()) is not None:
        raise SystemExit(f"--link: {missing}")
    os.environ.update(ONE_THREAD)
    # Ended from outside, it still stops its processes and removes its networks.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    about = machine()
    rows: list[list[str]] = []
    results: list[dict[str, object]] = []
    for workload, workers in SETTINGS if options.setting is None else [SETTINGS[options.setting]]:
        if options.steps is not None:
            workload = replace(workload, steps=options.steps, warm_up=options.steps // 5)
        if options.width is not None:
            workload = replace(workload, width=options.width)
        if options.warm_up is not None:
            workload = replace(workload, warm_up=options.warm_up)
        with (
            tempfile.TemporaryDirectory() as folder,
            shaped_pool(Path(folder), [f"worker-{index}" for index in range(workers)], rate) as pool,
        ):
            # What is rounded depends on where the model is cut, so that must not depend on what was measured.
            policy = options.policy or ("equal-compute" if options.codec == "none" else "equal-ops")
            spec = workload.job(write_text(Path(folder)), workers=workers, fragments=workers, policy=policy)
            spec["compression"] = {"codec": options.codec}
            if options.every is not None:
                spec["fault_tolerance"] = {"backup_every": options.every}
            job = capture_job(*read_job(spec))
            train(pool, job, workload, bare=False)  # files and code come into memory
            variants = {
                "backed up": partial(train, pool, job, workload, False),
                "bare": partial(train, pool, job, workload, True),
            }
            runs, disturbed = interleave(variants, options.rounds, options.repeats)
        if len({run.last_loss for taken in runs.values() for run in taken}) != 1:
            raise SystemExit("the losses differ: the two sides did not train the same")
        if any(run.snapshot_step for run in runs["bare"]) or not all(run.snapshot_step for run in runs["backed up"]):
            raise SystemExit("snapshots were taken where none should be, or not where they should be")
        figures = (
            ("ms/step", {name: Sample(tuple(run.seconds for run in taken)) for name, taken in runs.items()}),
            (
                "processor ms/step",
                {name: Sample(tuple(run.cpu_seconds for run in taken)) for name, taken in runs.items()},
            ),
        )
        result: dict[str, object] = {
            "workload": workload.describe(),
            "steps": [workload.warm_up, workload.steps],
            "workers": workers,
            "megabits_per_second": options.link,
            "codec": options.codec,
            "policy": policy,
            "backup_every": options.every or "auto",
            "cores_taken_by_others": disturbed,
        }
        for figure, samples in figures:
            ratio = ratios(samples["backed up"].values, samples["bare"].values)
            rows.append(
                [
                    f"{workload.describe()}, {workers} workers" if figure == "ms/step" else "",
                    figure,
                    *(f"{samples[name].median * 1e3:.1f}" for name in variants),
                    f"{ratio.median:.3f}",
                    ratio.spread(digits=3),
                ]
            )
            result[figure] = {
                "seconds": {name: sample.values for name, sample in samples.items()},
                "ratio": ratio.median,
                "spread": ratio.spread(digits=3),
            }
        results.append(result)
    names = ["backup_overhead", *([] if options.setting is None else [str(options.setting)])]
    names += [] if options.link is None else [f"{options.link:g}_mbit"]
    names += [] if options.codec == "none" else [options.codec]
    names += [] if options.policy is None else [options.policy]
    names += [] if options.every is None else [f"every_{options.every}"]
    names += [] if options.width is None else [f"width_{options.width}"]
    names += [] if options.warm_up is None else [f"after_{options.warm_up}"]
    report(
        "_".join(names),
        "A step with backups and logs over one without",
        ["setting", "figure", "with", "without", "ratio", "spread"],
        rows,
        {"machine": about, "target": f"ratio <= {BOUND}", "results": results},
    )


if __name__ == "__main__":
    main()
