"""How fast a job is after its pool has changed, over a job that begins on the changed pool.

`python benchmarks/rebalance.py`. Four workers act out a topology (`fusion up --topology` does the same), as in
`prediction.py`: slowed down so far that together they ask for less than one core. Two things happen, each in a job of
its own:

- *lost*: one of four workers is killed (`kill -9`); others adopt what it had, and the scheduler is asked for a better plan;
- *joined*: a job on three workers gets a fourth.

Fragments move whole; a job that begins on the same workers may cut anew. A job whose values travel as they are, as here, is cut
anew at its next checkpoint where that pays, so it is given many steps (and ended when enough have been seen) and a
checkpoint now and then. The goal: at most a tenth slower. A step counts with the median time between two reports.
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
from fusion.client import Client
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
STEPS = 2000
CHECKPOINT_EVERY = 25


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
    cut_anew: bool
    same_bits: bool
    """Both jobs had the same losses for as long as both ran."""

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


def captured(text: Path) -> CapturedJob:
    spec: dict[str, Any] = Workload(micro_batches=8, steps=STEPS).job(text)
    spec["checkpoint"] = {"every": CHECKPOINT_EVERY, "keep": 1}
    return capture_job(*read_job(spec))


def pace(run: Running, first: int, last: int) -> float:
    """Median time from one report to the next, from the one of step `first` to that of step `last`."""
    run.until_step(last, 600)
    return median(run.arrived[step] - run.arrived[step - 1] for step in range(first + 1, last + 1))


def end(client: Client, run: Running) -> None:
    client.cancel(run.id)
    run.until(lambda: run.ended)


def measure(name: str, event: str, job: CapturedJob, *, settle: int, counted: int) -> Change:
    make, changing = TOPOLOGIES[name]
    topology = topologies.slower(make(), SLOWER)
    everybody = topologies.names(topology)
    others = [worker for worker in everybody if worker != changing]
    at_first, at_last = (everybody, others) if event == "lost" else (others, everybody)
    with pool_of(topology, at_first) as pool, pool.client() as client:
        run = Running(pool, job)
        at_rest = pace(run, counted // 2, counted)
        before = run.plan()
        if event == "lost":
            pool.kill(changing)
        else:
            pool.start_worker(LocalWorker(changing))
            run.until(lambda: joined(pool, everybody))
        moved = pace(run, counted + settle, 2 * counted + settle)
        afterwards = run.plan()
        moves, cut_anew = run.count("moved"), run.heard("restarted")
        end(client, run)
    with pool_of(topology, at_last) as pool, pool.client() as client:
        fresh = Running(pool, job)
        fresh_pace = pace(fresh, counted, 2 * counted)
        placement = fresh.plan()
        end(client, fresh)
    both = run.losses.keys() & fresh.losses.keys()
    assert len(both) > CHECKPOINT_EVERY, "the jobs have too few steps in common to compare"
    return Change(
        topology=name,
        event=event,
        before=at_rest,
        afterwards=moved,
        fresh=fresh_pace,
        placement_before=before,
        placement_afterwards=afterwards,
        placement_fresh=placement,
        moves=moves,
        cut_anew=cut_anew,
        same_bits=all(run.losses[step] == fresh.losses[step] for step in both),
    )


def row(change: Change) -> list[str]:
    return [
        f"{change.topology}, one {change.event}",
        f"{change.before * 1e3:.0f}",
        f"{change.afterwards * 1e3:.0f}",
        f"{change.fresh * 1e3:.0f}",
        f"{change.ratio:.2f}",
        f"{'same bits' if change.same_bits else 'OTHER BITS'}; "
        f"{' '.join(change.placement_afterwards)}{' (cut anew)' if change.cut_anew else ''}; "
        f"fresh {' '.join(change.placement_fresh)}",
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
        job = captured(write_text(Path(folder)))
        for _ in range(options.rounds):
            for name in [options.topology] if options.topology else TOPOLOGIES:
                for event in [options.event] if options.event else EVENTS:
                    change = measure(name, event, job, settle=options.settle, counted=options.counted)
                    print(row(change), file=sys.stderr, flush=True)
                    changes.append(change)
    disturbed = round(disturbance.cores(), 2)
    rows = []
    for kind in dict.fromkeys((change.topology, change.event) for change in changes):
        of_kind = [change for change in changes if (change.topology, change.event) == kind]
        ratios = Sample(tuple(change.ratio for change in of_kind))
        typical = min(of_kind, key=lambda change: abs(change.ratio - ratios.median))
        rows.append([*row(typical)[:4], f"{ratios.median:.2f} ({ratios.spread(digits=2)})", row(typical)[5]])
    part = "_".join(filter(None, (options.topology, options.event))).replace(" ", "-")
    report(
        f"rebalance_{part}" if part else "rebalance",  # A part must not take the place of the record of all.
        f"Milliseconds per step after a change of the pool (goal: at most {GOAL} times a fresh job); others took {disturbed} cores",
        ["setting", "before", "afterwards", "fresh", "ratio", "placement"],
        rows,
        {
            "machine": about,
            "goal": GOAL,
            "met": all(change.ratio <= GOAL for change in changes),
            "same_bits": all(change.same_bits for change in changes),
            "cores_taken_by_others": disturbed,
            "changes": [asdict(change) | {"ratio": change.ratio} for change in changes],
        },
    )


if __name__ == "__main__":
    main()
