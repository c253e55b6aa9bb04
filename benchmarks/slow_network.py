"""One GPT over two cities whose link is slow: torch.distributed.pipelining over gloo beside ours under several policies and codecs.

`python benchmarks/slow_network.py`, as root, on the testbed (`testbed.py`): two workers in each city with 1 Gbit/s and 1 ms
between them, between the cities the rate of the setting and 20 ms one way. *fast* is 1 Gbit/s and 1 ms everywhere. All processes
have one thread and share this machine's cores.

- torch's ranks each take one block; *grouped* ranks cross between the cities once, *alternating* ones three times. The better of
  GPipe and 1F1B counts.
- In ours all four workers have to take part, but nothing says with how much: OP-Fence may give those of the other city next to
  nothing. *Equal-ops, auto* is the split into four that torch has, too; in *free to leave workers out* they may stay idle.
  Workers join city by city, which is the order that the equal policies follow. No snapshots are taken.

A step counts with the median over the counted steps. Losses are those after the last step; torch draws its samples in another
order, so its loss belongs to another run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import testbed, topologies
from benchmarks.common import (
    ONE_THREAD,
    Disturbance,
    Workload,
    machine,
    report,
    run_child,
    write_text,
)
from benchmarks.placed_pool import PlacedPool
from benchmarks.pool_runs import train_on
from benchmarks.relay import DEVICE
from benchmarks.testbed import Testbed
from fusion.local import LocalWorker
from fusion.plan import Plan
from fusion.submit import CapturedJob, capture_job, read_job
from fusion.topology import Topology
from scheduler import Training, from_topology, simulate_plan

YARDSTICK = Workload(vocabulary=512, sequence_length=128, micro_batches=8, micro_batch=4)
FAST = "fast"
SETTINGS: dict[str, Callable[[], Topology]] = {
    "8": lambda: topologies.two_cities(8.0),
    "20": lambda: topologies.two_cities(20.0),
    "100": lambda: topologies.two_cities(100.0),
    FAST: topologies.fast,
}
"""By name: Mbit/s between the cities."""
ORDERS = {"grouped": ("a-1", "a-2", "b-1", "b-2"), "alternating": ("a-1", "b-1", "a-2", "b-2")}
MOST_OVER_FAST = {"8": 1.5, "20": 1.25, "100": 1.1}
LEAST_OVER_TORCH = {"grouped": 10.0, "alternating": 13.0}
"""At 8 Mbit/s."""
LEAST_OVER_UNIFORM = 1.5
MOST_OVER_BOUND = 1.15
HEADLINE = "op-fence, auto"


@dataclass(frozen=True)
class Variant:
    """One of our rows."""

    policy: str
    codec: str = "none"
    ratio: float = 100.0
    all_workers: bool = True

    @property
    def name(self) -> str:
        codec = {"none": "dense", "topk": f"top-k 1/{self.ratio:g}", "adatopk": f"AdaTopK {self.ratio:g}"}
        free = "" if self.all_workers else ", free to leave workers out"
        return f"{self.policy}, {codec.get(self.codec, self.codec)}{free}"

    @property
    def uniform(self) -> bool:
        """Whether it looks neither at links nor at what they carry: a baseline."""
        return self.policy != "op-fence" and self.codec != "auto"


VARIANTS = (
    Variant("equal-ops"),
    Variant("equal-compute"),
    Variant("equal-compute", "topk"),
    Variant("equal-compute", "int8"),
    Variant("op-fence"),
    Variant("op-fence", "topk"),
    Variant("op-fence", "adatopk"),
    Variant("op-fence", "int8"),
    Variant("op-fence", "int4"),
    Variant("equal-ops", "auto"),
    Variant("op-fence", "auto"),
    Variant("op-fence", "auto", all_workers=False),
)


@dataclass(frozen=True)
class Row:
    """One side in one setting; seconds per step."""

    setting: str
    name: str
    seconds: float
    fastest: float
    slowest: float
    loss: float
    sent_bytes: int | None = None
    """Between workers, in one step."""
    link_seconds: float | None = None
    """What the busiest link takes for the bytes of a step: no step is faster."""
    predicted: float | None = None
    placement: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    uniform: bool = False


def theirs(bed: Testbed, setting: str, workload: Workload, text: Path) -> list[Row]:
    """torch's pipelining, the better schedule for each order of ranks."""
    found = []
    for order, workers in ORDERS.items():
        places = {
            "namespaces": [bed.namespaces[worker] for worker in workers],
            "address": bed.address(workers[0]),
            "device": DEVICE,
        }
        tried = []
        arguments = (workload.to_json(), str(text), str(len(workers)), "gpipe,1f1b", json.dumps(places))
        for schedule, run in run_child("torch_pipeline.py", *arguments).items():
            seconds = run["step_seconds"][workload.warm_up :]
            tried.append(
                Row(
                    setting,
                    f"torch, {order} ({schedule})",
                    median(seconds),
                    min(seconds),
                    max(seconds),
                    run["losses"][-1],
                )
            )
            _say(tried[-1])
        found.append(min(tried, key=lambda row: row.seconds))
    return found


def ours(
    bed: Testbed, setting: str, topology: Topology, job: CapturedJob, warm_up: int, variants: Sequence[Variant]
) -> list[Row]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = topologies.write(topology, Path(folder) / "topology.yaml")
        with PlacedPool(Path(folder) / "pool", (), bed, file) as pool:
            for worker in ORDERS["grouped"]:
                pool.start_worker(LocalWorker(worker))
                pool.workers = (*pool.workers, LocalWorker(worker))
                pool.wait_for_workers()
            for variant in variants:
                found.append(_train(pool, setting, topology, job, warm_up, variant))
                _say(found[-1])
    return found


def _train(pool: PlacedPool, setting: str, topology: Topology, job: CapturedJob, warm_up: int, variant: Variant) -> Row:
    workers = len(topology.workers) if variant.all_workers else None
    plan = job.spec.plan.model_copy(update={"policy": variant.policy, "workers": workers})
    compression = job.spec.compression.model_copy(update={"codec": variant.codec, "ratio": variant.ratio})
    spec = job.spec.model_copy(update={"plan": plan, "compression": compression})
    steps, ended = train_on(pool, CapturedJob(spec, job.dag, job.tensors, job.data))
    counted = [step["step_seconds"] for step in steps[warm_up:]]
    made = Plan.model_validate(ended["plan"])
    return Row(
        setting,
        f"ours: {variant.name}",
        median(counted),
        min(counted),
        max(counted),
        steps[-1]["loss"],
        round(median(step["sent_bytes"] for step in steps[warm_up:])),
        link_seconds(topology, job, made),
        made.predicted_step_seconds,
        made.placement,
        tuple(f"{choice.forward}/{choice.backward}" for choice in made.codecs.values()),
        variant.uniform,
    )


def link_seconds(topology: Topology, job: CapturedJob, plan: Plan) -> float:
    """Seconds for which the busiest link is busy with one step's bytes, as the simulator counts them."""
    devices, network = from_topology(topology)
    training = Training(micro_batches=job.spec.train.micro_batches, optimizer=job.spec.train.optimizer)
    played = simulate_plan(job.dag, plan, devices, network, training, trace=False)
    return max(
        (size / topology.link(*ends)[0] for ends, size in played.bytes_per_link.items() if ends[0] != ends[1]),
        default=0.0,
    )


def goals(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What was asked for, what came out, and whether it was met; only of what was run."""
    found: list[dict[str, Any]] = []

    def judge(what: str, value: float, bound: float, *, at_least: bool) -> None:
        met = value >= bound if at_least else value <= bound
        found.append({"goal": what, "value": value, "bound": bound, "met": met})

    best = {row.setting: row for row in rows if row.name == f"ours: {HEADLINE}"}
    for setting, row in best.items():
        mine = [other for other in rows if other.setting == setting]
        if setting == "8":
            for order, bound in LEAST_OVER_TORCH.items():
                for other in mine:
                    if other.name.startswith(f"torch, {order}"):
                        judge(f"8 Mbit/s: torch, {order}, over ours", other.seconds / row.seconds, bound, at_least=True)
        if setting in MOST_OVER_FAST and FAST in best:
            over = row.seconds / best[FAST].seconds
            judge(f"{setting} Mbit/s: over our own fast network", over, MOST_OVER_FAST[setting], at_least=False)
        uniform = [other.seconds for other in mine if other.uniform]
        if uniform and setting != FAST:
            judge(
                f"{setting} Mbit/s: our best uniform baseline over ours",
                min(uniform) / row.seconds,
                LEAST_OVER_UNIFORM,
                at_least=True,
            )
        dense = [other for other in mine if other.name == "ours: op-fence, dense"]
        if dense and setting == FAST:
            judge("fast network: auto over dense", row.seconds / dense[0].seconds, 1.05, at_least=False)
        if dense:
            name = "fast" if setting == FAST else f"{setting} Mbit/s"
            judge(f"{name}: loss over dense", row.loss / dense[0].loss, 1.01, at_least=False)
    return found


def _say(row: Row) -> None:
    print(f"{row.setting}: {row.name}: {row.seconds:.3f} s, loss {row.loss:.4f}", file=sys.stderr, flush=True)


def _cells(row: Row, reference: float) -> list[str]:
    return [
        f"{row.setting}: {row.name}",
        f"{row.seconds:.3f}",
        f"{row.fastest:.3f}..{row.slowest:.3f}",
        f"{reference / row.seconds:.1f}" if reference else "",
        f"{row.sent_bytes / 2**20:.2f}" if row.sent_bytes is not None else "",
        f"{row.link_seconds:.3f}" if row.link_seconds is not None else "",
        f"{row.predicted:.3f}" if row.predicted is not None else "",
        f"{row.loss:.4f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="Mbit/s")
    parser.add_argument("--steps", type=int, default=20, help="of each of our jobs")
    parser.add_argument("--torch-steps", type=int, default=5, help="of each of torch's; 0 leaves torch out")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="only our rows with one of these in their name"
    )
    options = parser.parse_args()
    reason = testbed.unavailable()
    if reason is not None:
        raise SystemExit(f"error: {reason}")
    os.environ.update(ONE_THREAD)
    # Ended from outside, it still stops its processes and removes its networks.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    about, disturbance = machine(), Disturbance()
    variants = [variant for variant in VARIANTS if any(text in variant.name for text in options.only)]
    workload = replace(YARDSTICK, steps=options.steps, warm_up=options.warm_up)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        spec = workload.job(text)
        spec["fault_tolerance"] = {"backup_every": 10**6, "log_memory": "2GiB"}
        job = capture_job(*read_job(spec))
        for setting in options.settings:
            topology = SETTINGS[setting]()
            with Testbed(topology) as bed:
                if options.torch_steps:
                    rows += theirs(bed, setting, replace(workload, steps=options.torch_steps), text)
                rows += ours(bed, setting, topology, job, options.warm_up, variants)
    disturbed = round(disturbance.cores(), 2)
    grouped = {row.setting: row.seconds for row in rows if row.name.startswith("torch, grouped")}
    judged = goals(rows)
    table = [_cells(row, grouped.get(row.setting, 0.0)) for row in rows]
    table += [
        [f"goal: {goal['goal']}", f"{goal['value']:.2f}", f"{goal['bound']:g}", "met" if goal["met"] else "MISSED"]
        + [""] * 4
        for goal in judged
    ]
    report(
        "slow_network",
        f"Seconds per step, Mbit/s between two cities: {workload.describe()}; others took {disturbed} cores",
        ["setting", "step", "range", "torch grouped over it", "MiB sent", "busiest link", "predicted", "loss"],
        table,
        {
            "machine": about,
            "workload": workload.describe(),
            "steps": options.steps,
            "torch_steps": options.torch_steps,
            "cores_taken_by_others": disturbed,
            "goals": judged,
            "rows": [asdict(row) for row in rows],
        },
    )


if __name__ == "__main__":
    main()
