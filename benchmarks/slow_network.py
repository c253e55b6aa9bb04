"""A model over slow and unequal networks: torch.distributed.pipelining over gloo beside ours under several policies and codecs.

`python benchmarks/slow_network.py`, as root, on the testbed (`testbed.py`); all of it takes hours, so it runs in pieces:
`--setting`, `--model` and `--only` choose, and each row goes into its setting's file as soon as it is measured. `--losses` then
trains 300 steps of every plan that a row had, without a network (`one_process.py`: the same plan gives the same bits), and
`--report` prints what is there, goals, and losses at the same time.

- *Two cities*: two workers in each with 1 Gbit/s and 1 ms between them, between the cities the rate of the setting and 20 ms one way.
  *fast* is 1 Gbit/s and 1 ms everywhere. *Home devices*: six, 1 to 4 times apart, with 8 to 100 Mbit/s and 15 ms. *One bad link*: four
  workers with 1 Gbit/s and 1 ms, but 8 Mbit/s and 50 ms between two of them. All processes have one thread and share this machine's cores;
  *slow motion* is two cities again with cores, rates and delays six times slower, so that no worker waits for another's core.
- torch's ranks each take a fourth of the model, in the orders of `slow_settings.py`. The better of GPipe and 1F1B counts.
- In ours all workers have to take part, but nothing says with how much: OP-Fence may give some next to nothing. *Equal-ops, auto* is the
  split that torch has, too; in *free to leave workers out* they may stay idle. Workers join in the order of the topology, which is the
  one that the equal policies follow. They keep no logs and take no snapshots, as torch's ranks do; `backup_overhead.py` says what
  these cost. *Whole backwards* has no gradients of weights wait.

A step counts with the median over the counted steps of its round, and a row with the median over rounds. What is compared is
compared round by round, and each round goes through all settings that were asked for: a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ONE_THREAD

os.environ.update(ONE_THREAD)  # before torch is loaded

from benchmarks import slow_jobs, slow_losses, slow_report, slow_rows, testbed, topologies
from benchmarks.common import Disturbance, machine, run_child
from benchmarks.placed_pool import PlacedPool
from benchmarks.placed_worker import BARE, WHOLE
from benchmarks.pool_runs import train_on
from benchmarks.relay import DEVICE
from benchmarks.slow_rows import Row
from benchmarks.slow_settings import SETTINGS, STAGES, VARIANTS, Setting, Variant
from benchmarks.testbed import Testbed
from coordinator.shown.views import ShownPlan
from fusion.local import LocalWorker
from fusion.submit import CapturedJob


def theirs(bed: Testbed, setting: Setting, model: str, data: Path, steps: int, warm_up: int) -> Iterator[Row]:
    """torch's pipelining, the better schedule for each order of ranks."""
    workload = replace(slow_jobs.BATCHES[model], steps=steps, warm_up=warm_up)
    topology = setting.topology()
    for order, workers in setting.orders.items():
        places = {
            "namespaces": [bed.namespaces[worker] for worker in workers],
            "address": bed.address(workers[0]),
            "device": DEVICE,
            "slowdowns": [topology.slowdown(worker) for worker in workers],
            "task": model,
        }
        disturbance, tried = Disturbance(), []
        arguments = (workload.to_json(), str(data), str(STAGES), "gpipe,1f1b", json.dumps(places))
        for schedule, run in run_child("torch_pipeline.py", *arguments, timeout=3600).items():
            seconds = run["step_seconds"][warm_up:]
            name = f"torch, {order} ({schedule})"
            losses = tuple(run["losses"])
            tried.append(
                Row(model, setting.name, name, median(seconds), min(seconds), max(seconds), losses, warm_up, 0.0)
            )
            _say(tried[-1])
        best = min(tried, key=lambda row: row.seconds)
        yield replace(best, name=f"torch, {order}", disturbed=round(disturbance.cores(), 2))


def ours(bed: Testbed, setting: Setting, job: CapturedJob, warm_up: int, variants: Sequence[Variant]) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        file = topologies.write(setting.topology(), Path(folder) / "topology.yaml")
        with PlacedPool(Path(folder) / "pool", (), bed, file) as pool:
            for worker in setting.workers:
                pool.start_worker(LocalWorker(worker), profile_seconds=1.0)
                pool.workers = (*pool.workers, LocalWorker(worker))
                pool.wait_for_workers()
            for variant in variants:
                yield train(pool, setting, job, warm_up, variant)


def train(pool: PlacedPool, setting: Setting, job: CapturedJob, warm_up: int, variant: Variant) -> Row:
    workers = len(setting.workers) if variant.all_workers else None
    plan = job.spec.plan.model_copy(update={"policy": variant.policy, "workers": workers})
    compression = job.spec.compression.model_copy(
        update={"codec": variant.codec, "ratio": variant.ratio, "backward": variant.backward}
    )
    spec = job.spec.model_copy(update={"plan": plan, "compression": compression})
    pool.switch(WHOLE, variant.whole)
    pool.switch(BARE, True)
    disturbance = Disturbance()
    steps, ended = train_on(pool, CapturedJob(spec, job.dag, job.tensors, job.data))
    disturbed = round(disturbance.cores(), 2)
    with pool.client() as client:
        timeline = client.timeline(ended["id"])
    counted = [step["step_seconds"] for step in steps[warm_up:]]
    made = ShownPlan.model_validate(ended["plan"])
    return Row(
        model=job.spec.name,
        setting=setting.name,
        name=f"ours: {variant.name}",
        seconds=median(counted),
        fastest=min(counted),
        slowest=max(counted),
        losses=tuple(step["loss"] for step in steps),
        warm_up=warm_up,
        disturbed=disturbed,
        sent_bytes=round(median(step["sent_bytes"] for step in steps[warm_up:])),
        link_seconds=slow_rows.link_seconds(setting.topology(), job, made),
        stage_seconds=slow_rows.stage_seconds(timeline),
        predicted=made.predicted_step_seconds,
        plan=made.model_dump(mode="json", exclude={"id"}),
        uniform=variant.uniform,
    )


def measure(
    setting: Setting, model: str, steps: int, torch_steps: int, warm_up: int, variants: Sequence[Variant]
) -> Iterator[Row]:
    """Every row of one setting, once."""
    with tempfile.TemporaryDirectory() as name, Testbed(setting.topology()) as bed:
        data = slow_jobs.data_of(model, Path(name))
        if torch_steps:
            yield from theirs(bed, setting, model, Path(next(iter(data.values()))), torch_steps, warm_up)
        if variants:
            spec = slow_jobs.job_spec(model, data, steps)
            for row in ours(bed, setting, slow_jobs.captured_from(spec), warm_up, variants):
                _say(row)
                yield row


def _say(row: Row) -> None:
    loss = "lost" if row.losses[-1] is None else f"{row.losses[-1]:.4f}"
    text = f"{row.setting}, {row.model}: {row.name}: {row.seconds:.3f} s, loss {loss}"
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", "--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--model", nargs="+", choices=slow_jobs.MODELS, default=["gpt"])
    parser.add_argument("--steps", type=int, default=8, help="of each of our jobs")
    parser.add_argument("--torch-steps", type=int, default=4, help="of each of torch's; 0 leaves torch out")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--rounds", type=int, default=3, help="of everything, every other one in the opposite order")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="only our rows with one of these in their name"
    )
    parser.add_argument("--losses", action="store_true", help="train the plans of the rows that are there, and report")
    parser.add_argument("--report", action="store_true", help="measure nothing, print what is there")
    options = parser.parse_args()
    if options.losses:
        slow_losses.train_all(options.setting, options.model, options.only)
    if options.losses or options.report:
        print(slow_report.report(options.setting, options.model))
        return
    for flag, steps in (("--steps", options.steps), ("--torch-steps", options.torch_steps)):
        if steps and steps <= options.warm_up:
            parser.error(f"{flag} {steps} leaves nothing to count after --warm-up {options.warm_up}; give more")
    reason = testbed.unavailable()
    if reason is not None:
        raise SystemExit(f"error: {reason}")
    # Ended from outside, it still stops its processes and removes its networks.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    variants = [variant for variant in VARIANTS if any(text in variant.name for text in options.only)]
    about, of_rows = machine(), defaultdict[tuple[str, str, str], list[Row]](list)
    for number in range(options.rounds):
        order = 1 if number % 2 == 0 else -1
        for model in options.model:
            for setting in options.setting:
                steps = options.steps, options.torch_steps, options.warm_up
                for row in measure(SETTINGS[setting], model, *steps, variants[::order]):
                    taken = of_rows[row.model, row.setting, row.name]
                    taken.append(row)
                    slow_rows.put(slow_rows.of_rounds(taken), about)
    print(slow_report.report(options.setting, options.model))


if __name__ == "__main__":
    main()
