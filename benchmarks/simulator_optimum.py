"""OP-Fence's simulated step time over the best of all placements, for random small pools and chains.

`python benchmarks/simulator_optimum.py`. Up to 6 devices whose speeds are up to 10 times apart, links from 2.5 to 800 Mbit/s,
12 positions to cut at, 1 to 8 micro-batches, 1F1B and GPipe in turn. A search that is cut off (`--nodes`) counts with the best
it found, and is listed. Nothing is timed: figures don't depend on the machine's load.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "scheduler"))

from oracle import PRECISION, search
from scheduler_cases import random_case

from benchmarks.common import report
from dag.workload import workload
from fusion.plan import ScheduleName
from fusion.spec import OptimizerSpec
from scheduler import plan_job
from scheduler.cost import Costs

SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "gpipe")
TARGET = {"mean": 1.05, "worst": 1.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--devices", type=int, default=6)
    parser.add_argument("--positions", type=int, default=12)
    parser.add_argument("--nodes", type=int, default=40_000, help="partial placements that the search may look at")
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
    unfinished = []
    for seed in range(options.cases):
        dag, devices, network, micro_batches = random_case(
            seed, most_devices=options.devices, positions=options.positions
        )
        schedule = SCHEDULES[seed % 2]
        plan = plan_job(dag, devices, network, schedule=schedule, micro_batches=micro_batches)
        assert plan.predicted_step_seconds is not None
        costs = Costs(workload(dag), devices, network, schedule, micro_batches, OptimizerSpec())
        answer = search(costs, plan.predicted_step_seconds, options.nodes)
        ratios[schedule].append(plan.predicted_step_seconds / answer.seconds)
        if not answer.complete:
            unfinished.append({"case": seed, "best_possible": plan.predicted_step_seconds / answer.bound})
        if sys.stderr.isatty():
            print(f"\rcase {seed + 1}/{options.cases}", end="", file=sys.stderr)
    rows = [
        [
            schedule,
            str(len(found)),
            f"{mean(found):.4f}",
            f"{max(found):.3f}",
            str(sum(ratio > 1.05 for ratio in found)),
        ]
        for schedule, found in [*ratios.items(), ("both", [ratio for found in ratios.values() for ratio in found])]
        if found
    ]
    print(f"{len(unfinished)} searches were cut off; optimum known to {PRECISION:.1%}")
    report(
        "simulator_optimum",
        "OP-Fence over the optimum, simulated step time",
        ["schedule", "cases", "mean", "worst", "above 1.05"],
        rows,
        {"settings": vars(options), "target": TARGET, "ratios": ratios, "unfinished": unfinished},
    )


if __name__ == "__main__":
    main()
