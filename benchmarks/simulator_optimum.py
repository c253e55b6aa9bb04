"""OP-Fence's simulated step time over the best of all placements, for random small pools and chains.

`python benchmarks/simulator_optimum.py`. Up to 6 devices whose speeds are up to 10 times apart, links from 2.5 to 800 Mbit/s,
12 positions to cut at, 1 to 8 micro-batches, 1F1B and GPipe in turn. A search that is cut off (`--nodes`) counts with the best
it found, and is listed. Nothing is timed: figures don't depend on the machine's load.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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


def judged(seed: int, *, devices: int, positions: int, nodes: int) -> tuple[float, float | None]:
    """The plan over the best placement found; where the search was cut off, also over the best that may exist."""
    dag, pool, network, micro_batches = random_case(seed, most_devices=devices, positions=positions)
    schedule = SCHEDULES[seed % 2]
    plan = plan_job(dag, pool, network, schedule=schedule, micro_batches=micro_batches)
    assert plan.predicted_step_seconds is not None
    costs = Costs(workload(dag), pool, network, schedule, micro_batches, OptimizerSpec())
    answer = search(costs, plan.predicted_step_seconds, nodes)
    possible = None if answer.complete else plan.predicted_step_seconds / answer.bound
    return plan.predicted_step_seconds / answer.seconds, possible


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--devices", type=int, default=6)
    parser.add_argument("--positions", type=int, default=12)
    parser.add_argument("--nodes", type=int, default=40_000, help="partial placements that the search may look at")
    options = parser.parse_args()
    ratios: dict[str, list[float]] = {schedule: [] for schedule in SCHEDULES}
    unfinished = []
    judge = partial(judged, devices=options.devices, positions=options.positions, nodes=options.nodes)
    with ProcessPoolExecutor() as pool:
        for seed, (ratio, possible) in enumerate(pool.map(judge, range(options.cases))):
            ratios[SCHEDULES[seed % 2]].append(ratio)
            if possible is not None:
                unfinished.append({"case": seed, "best_possible": possible})
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
