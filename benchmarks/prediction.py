"""How well the simulator predicts a step: 2 models on 3 topologies under 2 policies, predicted and measured in paced local mode.

`python benchmarks/prediction.py`. Four workers act out each topology (`fusion up --topology` does the same). They share this
machine's cores, so all are slowed down beside a worker that is not started: together they ask for less than one, and what
one waits for a core counts as rest. All four have to take part; values travel as they are; no snapshots are taken, because
how often they are is not part of a prediction. A step counts with the median over the counted steps.

Two predictions stand beside each measurement:

- *as planned*: what the coordinator predicted from what the workers measured of themselves as they joined;
- *calibrated*: the same, but with all devices slower or faster by one factor for each model, which is that of a job on a single
  worker of the same pool.

The goal is a median error of at most 10%.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import topologies
from benchmarks.common import ONE_THREAD, ROOT, Disturbance, Workload, machine, report, write_text
from benchmarks.pool_runs import train_on
from coordinator.plans.planning import Candidate, alike
from coordinator.plans.scheduling import SchedulerPlanner
from coordinator.shown.views import ShownPlan
from coordinator.submission import train_config
from fusion.local import LocalPool, LocalWorker
from fusion.messages import Device
from fusion.plan import Plan
from fusion.submit import CapturedJob, capture_job, read_job
from fusion.topology import Topology

GOAL = 0.10
POLICIES = ("op-fence", "equal-compute")
TOPOLOGIES: dict[str, Callable[[], Topology]] = {
    "two cities, 20 Mbit/s": partial(topologies.two_cities, 20.0),
    "home devices": topologies.home_devices,
    "one bad link": topologies.one_bad_link,
}
SLOWER = {"two cities, 20 Mbit/s": 6.0, "home devices": 4.0, "one bad link": 6.0}
"""Beside a whole core, so that all workers together need two thirds of one, and others on the machine disturb little."""
WORKLOAD = Workload(micro_batches=8)
EXAMPLES = ROOT / "examples"


def gpt(text: Path) -> dict[str, Any]:
    return WORKLOAD.job(text)


def resnet(text: Path) -> dict[str, Any]:
    """ResNet-18 on real digits."""
    return {
        "name": "benchmark",
        "model": {
            "entrypoint": f"{EXAMPLES / 'models' / 'resnet.py'}:build",
            "args": {"depth": 18, "channels": 1, "classes": 10, "width": 8},
        },
        "loss": {"entrypoint": f"{EXAMPLES / 'models' / 'resnet.py'}:loss"},
        "data": {"entrypoint": f"{EXAMPLES / 'data' / 'digits.py'}:dataset", "args": {"size": 16}},
        "train": {"global_batch": 64, "micro_batch": 8, "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}},
    }


MODELS = {"GPT": gpt, "ResNet-18": resnet}


@dataclass(frozen=True)
class Setting:
    """One of the predictions; seconds per step."""

    model: str
    topology: str
    policy: str
    measured: float
    fastest: float
    slowest: float
    planned: float
    calibrated: float
    factor: float
    """How many times slower than they measured devices are with this model on a single worker."""
    placement: tuple[str, ...]
    sent_bytes: int
    """Of one step."""

    @property
    def planned_error(self) -> float:
        return self.planned / self.measured - 1

    @property
    def calibrated_error(self) -> float:
        return self.calibrated / self.measured - 1


@dataclass(frozen=True)
class Trained:
    """One job's counted steps, and its plan."""

    plan: Plan
    seconds: tuple[float, ...]
    sent_bytes: int


def train(pool: LocalPool, job: CapturedJob, warm_up: int, policy: str, workers: int) -> Trained:
    plan = job.spec.plan.model_copy(update={"policy": policy, "workers": workers})
    steps, ended = train_on(
        pool, CapturedJob(job.spec.model_copy(update={"plan": plan}), job.dag, job.tensors, job.data)
    )
    counted = steps[warm_up:]
    return Trained(
        ShownPlan.model_validate(ended["plan"]),
        tuple(step["step_seconds"] for step in counted),
        round(median(step["sent_bytes"] for step in counted)),
    )


def price(pool: LocalPool, topology: Topology, job: CapturedJob, plan: Plan, slower: float = 1.0) -> float:
    """What the coordinator's planner predicts for this plan, with devices that many times slower than they measured."""
    config = train_config(job.spec, job.data.manifest)
    with pool.client() as client:
        candidates = [
            Candidate(worker["name"], Device.model_validate(worker["device"]), slower) for worker in client.workers()
        ]
    planner = SchedulerPlanner(topology, relative_speeds=True)
    seconds = planner.price(job.dag, alike(candidates), job.spec, config, plan)
    if seconds is None:
        raise SystemExit("the plan does not fit its pool")
    return seconds


def measure(name: str, text: Path, steps: int, warm_up: int, models: Sequence[str]) -> list[Setting]:
    topology = topologies.slower(TOPOLOGIES[name](), SLOWER[name])
    workers = [LocalWorker(worker) for worker in topologies.names(topology)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = topologies.write(topology, Path(folder) / "topology.yaml")
        with LocalPool(Path(folder) / "pool", workers, topology=file, dashboard=False) as pool:
            pool.wait_for_workers()
            for model in models:
                spec = MODELS[model](text)
                spec["train"]["steps"] = steps
                spec["fault_tolerance"] = {"backup_every": 10**6, "log_memory": "2GiB"}
                job = capture_job(*read_job(spec))
                alone = train(pool, job, warm_up, "op-fence", 1)
                factor = median(alone.seconds) / price(pool, topology, job, alone.plan)
                for policy in POLICIES:
                    trained = train(pool, job, warm_up, policy, len(workers))
                    found.append(
                        Setting(
                            model=model,
                            topology=name,
                            policy=policy,
                            measured=median(trained.seconds),
                            fastest=min(trained.seconds),
                            slowest=max(trained.seconds),
                            planned=price(pool, topology, job, trained.plan),
                            calibrated=price(pool, topology, job, trained.plan, factor),
                            factor=factor,
                            placement=trained.plan.placement,
                            sent_bytes=trained.sent_bytes,
                        )
                    )
                    print(_row(found[-1]), file=sys.stderr, flush=True)
    return found


def _row(setting: Setting) -> list[str]:
    return [
        f"{setting.model}, {setting.topology}, {setting.policy}",
        f"{setting.measured * 1e3:.0f}",
        f"{setting.fastest * 1e3:.0f}..{setting.slowest * 1e3:.0f}",
        f"{setting.planned * 1e3:.0f}",
        f"{setting.planned_error:+.0%}",
        f"{setting.calibrated * 1e3:.0f}",
        f"{setting.calibrated_error:+.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="of each job")
    parser.add_argument("--warm-up", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--topology", choices=list(TOPOLOGIES), help="only this one")
    parser.add_argument("--model", choices=list(MODELS), help="only this one")
    options = parser.parse_args()
    os.environ.update(ONE_THREAD)
    about = machine()
    disturbance = Disturbance()
    settings: list[Setting] = []
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        for name in TOPOLOGIES if options.topology is None else [options.topology]:
            models = list(MODELS) if options.model is None else [options.model]
            settings += measure(name, text, options.steps, options.warm_up, models)
    disturbed = round(disturbance.cores(), 2)
    errors = {
        "planned": [abs(setting.planned_error) for setting in settings],
        "calibrated": [abs(setting.calibrated_error) for setting in settings],
    }
    summary = {name: {"median": median(found), "worst": max(found)} for name, found in errors.items()}
    rows = [_row(setting) for setting in settings]
    planned, calibrated = (
        f"{figures['median']:.0%}, worst {figures['worst']:.0%}"
        for figures in (summary["planned"], summary["calibrated"])
    )
    rows.append(["median error", "", "", "", planned, "", calibrated])
    report(
        "prediction",
        f"Predicted and measured milliseconds per step (goal: median error at most {GOAL:.0%}); others took {disturbed} cores",
        ["setting", "measured", "range", "as planned", "error", "calibrated", "error"],
        rows,
        {
            "machine": about,
            "goal": GOAL,
            "met": {name: figures["median"] <= GOAL for name, figures in summary.items()},
            "cores_taken_by_others": disturbed,
            "slower_than_a_core": SLOWER,
            "errors": summary,
            "settings": [
                asdict(setting) | {"planned_error": setting.planned_error, "calibrated_error": setting.calibrated_error}
                for setting in settings
            ],
        },
    )


if __name__ == "__main__":
    main()
