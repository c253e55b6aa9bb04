"""How fast a job is after its pool has changed, over a job that begins on the changed pool.

`python benchmarks/rebalance.py`. Four workers act out a topology (`fusion up --topology` does the same), as in
`prediction.py`: slowed down so far that together they ask for less than one core. Two things happen, each in a job of
its own:

- *lost*: one of four workers is killed (`kill -9`); others adopt what it had, and the scheduler is asked for a better plan;
- *joined*: a job on three workers gets a fourth.

Cuts and codecs stay as they were, so that the bits do: fragments move whole. A job that begins on the same workers may cut
anew; that is the difference to be seen. The goal: at most a tenth slower. A step counts with the median of the last steps of each job.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import topologies
from benchmarks.common import ONE_THREAD, Disturbance, Sample, Workload, machine, report, write_text
from benchmarks.disturbed import Running, joined
from fusion.local import LocalPool, LocalWorker
from fusion.submit import CapturedJob, capture_job, read_job
from fusion.topology import Topology

GOAL = 1.1
TOPOLOGIES: dict[str, tuple[Callable[[], Topology], str]] = {
    "four alike": (topologies.fast, "a-2"),
    "home devices": (topologies.home_devices, "h-2"),
}
"""Name -> topology, and the worker that is lost or joins."""
SLOWER = 5.0
"""Beside a whole core, so that four workers together need less than one."""
EVENTS = ("lost", "joined")


@dataclass(frozen=True)
class Change:
    """One job whose pool changed and one that began on the changed pool; seconds per step."""

    topology: str
    event: str
    before: float
    afterwards: float
    fresh: float
    placement_before: tuple[str, ...]
    placement_afterwards: tuple[str, ...]
    placement_fresh: tuple[str, ...]
    moves: int
    """Moves of fragments after the change, the adoption not counted."""

    @property
    def ratio(self) -> float:
        return self.afterwards / self.fresh


@contextmanager
def pool_of(topology: Topology, names: list[str]) -> Iterator[LocalPool]:
    with tempfile.TemporaryDirectory() as folder:
        file = topologies.write(topology, Path(folder) / "topology.yaml")
        workers = [LocalWorker(name) for name in names]
        with LocalPool(Path(folder) / "pool", workers, topology=file, dashboard=False) as pool:
            pool.wait_for_workers()
            yield pool


def captured(workload: Workload, text: Path, steps: int) -> CapturedJob:
    spec: dict[str, Any] = workload.job(text)
    spec["train"]["steps"] = steps
    return capture_job(*read_job(spec))


def last_steps(run: Running, counted: int) -> float:
    """Median of the last steps of a job that has ended."""
    outcome = run.finish()
    return median(outcome.step_seconds[step] for step in sorted(outcome.step_seconds)[-counted:])


def measure(name: str, event: str, text: Path, workload: Workload, *, settle: int, counted: int) -> Change:
    make, changing = TOPOLOGIES[name]
    topology = topologies.slower(make(), SLOWER)
    everybody = topologies.names(topology)
    others = [worker for worker in everybody if worker != changing]
    at_first, at_last = (everybody, others) if event == "lost" else (others, everybody)
    with pool_of(topology, at_first) as pool:
        run = Running(pool, captured(workload, text, 2 * counted + settle))
        run.until_step(counted)
        before = run.plan()
        if event == "lost":
            pool.kill(changing)
        else:
            pool.start_worker(LocalWorker(changing))
            run.until(lambda: joined(pool, everybody))
        run.until_step(counted + settle, 600)
        afterwards = run.plan()
        outcome = run.finish()
        paces = [outcome.step_seconds[step] for step in sorted(outcome.step_seconds)]
        if outcome.count("restarted"):
            raise SystemExit(f"the job went back to a checkpoint\n{run.story()}")
    with pool_of(topology, at_last) as pool:
        fresh = Running(pool, captured(workload, text, 2 * counted))
        fresh.until_step(1)
        placement = fresh.plan()
        fresh_pace = last_steps(fresh, counted)
    return Change(
        topology=name,
        event=event,
        before=median(paces[counted // 2 : counted]),
        afterwards=median(paces[-counted:]),
        fresh=fresh_pace,
        placement_before=before,
        placement_afterwards=afterwards,
        placement_fresh=placement,
        moves=outcome.count("moved"),
    )


def row(change: Change) -> list[str]:
    return [
        f"{change.topology}, one {change.event}",
        f"{change.before * 1e3:.0f}",
        f"{change.afterwards * 1e3:.0f}",
        f"{change.fresh * 1e3:.0f}",
        f"{change.ratio:.2f}",
        f"{' '.join(change.placement_afterwards)}; fresh {' '.join(change.placement_fresh)}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settle", type=int, default=50, help="steps between the change and those that count")
    parser.add_argument("--counted", type=int, default=15, help="steps of each job")
    parser.add_argument("--topology", choices=list(TOPOLOGIES), help="only this one")
    parser.add_argument("--event", choices=EVENTS, help="only this one")
    options = parser.parse_args()
    os.environ.update(ONE_THREAD)
    # Ended from outside, it still stops its processes.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    about = machine()
    disturbance = Disturbance()
    changes: list[Change] = []
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        for _ in range(options.rounds):
            for name in [options.topology] if options.topology else TOPOLOGIES:
                for event in [options.event] if options.event else EVENTS:
                    workload = Workload(micro_batches=8)
                    change = measure(name, event, text, workload, settle=options.settle, counted=options.counted)
                    print(row(change), file=sys.stderr, flush=True)
                    changes.append(change)
    disturbed = round(disturbance.cores(), 2)
    rows = []
    for kind in dict.fromkeys((change.topology, change.event) for change in changes):
        of_kind = [change for change in changes if (change.topology, change.event) == kind]
        ratios = Sample(tuple(change.ratio for change in of_kind))
        typical = min(of_kind, key=lambda change: abs(change.ratio - ratios.median))
        rows.append([*row(typical)[:4], f"{ratios.median:.2f} ({ratios.spread(digits=2)})", row(typical)[5]])
    report(
        "rebalance",
        f"Milliseconds per step after a change of the pool (goal: at most {GOAL} times a fresh job); others took {disturbed} cores",
        ["setting", "before", "afterwards", "fresh", "ratio", "placement"],
        rows,
        {
            "machine": about,
            "goal": GOAL,
            "met": all(change.ratio <= GOAL for change in changes),
            "cores_taken_by_others": disturbed,
            "changes": [asdict(change) | {"ratio": change.ratio} for change in changes],
        },
    )


if __name__ == "__main__":
    main()
