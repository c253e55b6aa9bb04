"""Jobs that are trained on pools of this machine, and what they took."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.common import ONE_THREAD, Workload, peak_memory

if TYPE_CHECKING:
    from fusion.local import LocalPool
    from fusion.submit import CapturedJob


@dataclass(frozen=True)
class OurRun:
    """One job on a pool of its own."""

    step_seconds: tuple[float, ...]
    losses: tuple[float, ...]
    cpu_seconds: float
    """Processor time of a counted step, all processes of the pool together."""
    peak_bytes: dict[str, int]
    """Peak memory of each worker process."""
    plan: dict[str, Any]


class ProcessorTime:
    """Processor time of all processes of a pool, from what it says while it trains the workload."""

    def __init__(self, pool: LocalPool, workload: Workload) -> None:
        self._pool = pool
        self._workload = workload
        self._spent: dict[int, float] = {}

    def take(self, item: Any) -> None:
        if item.kind == "metrics" and item.data["step"] in (self._workload.warm_up, self._workload.steps):
            times = [psutil.Process(pid).cpu_times() for pid in self._pool.process_ids().values()]
            self._spent[item.data["step"]] = sum(time.user + time.system for time in times)

    @property
    def per_step(self) -> float:
        """Seconds for a counted step."""
        begin, end = self._workload.warm_up, self._workload.steps
        return (self._spent[end] - self._spent[begin]) / (end - begin)


def run_ours(workload: Workload, text: Path, workers: int, **plan: object) -> OurRun:
    """Train the workload on a coordinator and `workers` worker processes on this machine."""
    from fusion.local import LocalPool, LocalWorker
    from fusion.submit import capture_job, read_job

    os.environ.update(ONE_THREAD)
    spec, base = read_job(workload.job(text, workers=workers, **plan))
    with tempfile.TemporaryDirectory() as folder:
        names = [LocalWorker(f"worker-{index}") for index in range(workers)]
        with LocalPool(Path(folder), names, dashboard=False) as pool:
            pool.wait_for_workers()
            processor = ProcessorTime(pool, workload)
            steps, ended = train_on(pool, capture_job(spec, base), processor.take)
            peaks = {name: peak_memory(pid) for name, pid in pool.process_ids().items() if name != "coordinator"}
    if len(steps) != workload.steps:
        raise SystemExit(f"{len(steps)} steps were reported, {workload.steps} were asked for")
    return OurRun(
        tuple(step["step_seconds"] for step in steps),
        tuple(step["loss"] for step in steps),
        processor.per_step,
        peaks,
        dict(ended["plan"]),
    )


def train_on(
    pool: LocalPool, job: CapturedJob, listen: Callable[[Any], None] = lambda _: None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train a job on a pool that runs already; returns the metrics of its steps, in order, and the job at its end.

    `listen` hears of everything that the coordinator says meanwhile.
    """
    from fusion.local import check_done
    from fusion.submit import submit

    metrics: dict[int, dict[str, Any]] = {}

    def take(item: Any) -> None:
        if item.kind == "metrics":
            metrics[item.data["step"]] = item.data
        listen(item)

    with pool.client() as client:
        ended = pool.watch(str(submit(client, job)["id"]), take)
    check_done(ended)
    return [metrics[step] for step in sorted(metrics)], ended
