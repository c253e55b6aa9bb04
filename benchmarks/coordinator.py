"""One coordinator on one core with many workers and viewers: how long answers and heartbeats take, memory, and a `kill -9`.

`python benchmarks/coordinator.py [--minutes 10] [--workers 500] [--viewers 50]`. The coordinator is a process of its own on
the last core; everybody else lives in this process, on the other cores: workers with their real control channels, which send
heartbeats and report the steps of running jobs, and dashboards with their event streams and reads. At the end the coordinator
is killed under load and started again over the same state: what anybody had been told must still be so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "coordinator"))

import aiohttp
import psutil
from coordinator_cases import data_blob, ref_of, spec_json

from benchmarks.common import Disturbance, machine, report
from benchmarks.histogram import Histogram
from benchmarks.load_jobs import chain
from benchmarks.load_viewers import Meters, Told, Viewer
from benchmarks.load_workers import Crew, LoadWorker
from benchmarks.watched_coordinator import Daemon, stamp
from coordinator.entry import access
from dag.serialize import dumps
from fusion.errors import FusionError

GOAL_MS = 100.0
BACK_SECONDS = 30.0
"""Until everybody is heard again after a restart; longer counts as a failure."""


@dataclass(frozen=True)
class Load:
    workers: int = 500
    viewers: int = 50
    crew: int = 40
    """Workers of one job."""
    jobs: int = 10
    step_seconds: float = 1.0
    warm_up: float = 120.0
    """Until what is kept of the last steps and links is full."""
    seconds: float = 600.0
    """That are measured, after the warm-up."""
    pin: bool = True
    """Give the coordinator one core, and everybody else the others."""


# The measurement ------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """Everything of one measurement that lives in this process."""

    load: Load
    core: int
    folder: Path
    session: aiohttp.ClientSession
    daemon: Daemon
    told: Told = field(default_factory=Told)
    meters: Meters = field(default_factory=Meters)
    problems: list[str] = field(default_factory=list)
    workers: dict[str, LoadWorker] = field(default_factory=dict)
    crews: dict[str, Crew] = field(default_factory=dict)
    viewers: list[Viewer] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    async def call(self, method: str, path: str, **content: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.daemon.said['token']}"}
        async with self.session.request(method, self.daemon.url + path, headers=headers, **content) as response:
            answer = await response.json()
            if response.status >= 400:
                raise FusionError(f"{method} {path}: {answer['error']}")
            return answer

    def crew_of(self, job: str) -> Crew:
        return self.crews.setdefault(job, Crew(job, self.workers, self.load.step_seconds))

    def reported_at(self, job: str, step: int) -> float | None:
        crew = self.crews.get(job)
        return crew.reported_at.get(step) if crew is not None else None

    async def join(self) -> None:
        names = iter([f"worker-{number:03}" for number in range(self.load.workers)])

        async def joining() -> None:
            for name in names:
                worker = self.workers[name] = LoadWorker(name, self.crew_of, self.problems)
                await worker.join(self.session, self.daemon.url, access.load(self.state).join_token)

        await asyncio.gather(*(joining() for _ in range(8)))

    async def submit(self) -> None:
        dag, weights = chain(self.load.crew)
        blobs = {"dag": dumps(dag), "weights": weights, "data": data_blob()}
        refs = {name: ref_of(content).model_dump() for name, content in blobs.items()}
        for name, content in blobs.items():
            await self.call("PUT", f"/api/v1/blobs/{refs[name]['digest']}", data=content)
        data = {"kind": "arrays", "blob": refs["data"], "samples": 16, "train_samples": 12, "feeds": {}}
        for _ in range(self.load.jobs):
            changes: dict[str, Any] = {
                "train": {"steps": 10**6},
                "plan": {"workers": self.load.crew},
                "fault_tolerance": {"failure_timeout": 5.0},
            }
            body = {"spec": spec_json(**changes), "dag": refs["dag"], "weights": refs["weights"], "data": data}
            self.crew_of((await self.call("POST", "/api/v1/jobs", json=body))["id"])

    async def until_training(self, beyond: int = 0) -> None:
        """Until every job has counted more steps than so many."""
        while True:
            jobs = (await self.call("GET", "/api/v1/jobs"))["jobs"]
            if all(job["state"] == "running" and job["step"] > beyond for job in jobs):
                return
            await asyncio.sleep(0.25)

    async def until_all_are_heard(self, since: int) -> None:
        """Until a message of every worker has been counted that was sent after this `stamp`."""
        while True:
            workers = (await self.call("GET", "/api/v1/workers"))["workers"]
            if all(worker["memory_used_bytes"] > since for worker in workers):
                return
            await asyncio.sleep(0.25)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """With all viewers, and somebody who reads for a machine."""
        made = [
            Viewer(self.session, self.daemon.url, list(self.crews), self.told, self.meters, self.reported_at, seed)
            for seed in range(self.load.viewers + 1)
        ]
        self.viewers = made
        tasks = [asyncio.create_task(viewer.watch()) for viewer in made[1:]]
        tasks.append(asyncio.create_task(made[0].scrape()))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            self.problems += [f"a viewer failed: {end!r}" for end in ended if isinstance(end, Exception)]


async def measure(load: Load) -> dict[str, Any]:
    """Put the load on a coordinator and return what was found."""
    cores = os.sched_getaffinity(0)
    core = max(cores) if load.pin and len(cores) > 1 else -1
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))  # Closes the workers' sockets.
    with tempfile.TemporaryDirectory() as name:
        state = Path(name) / "state"
        state.mkdir(mode=0o700)
        daemon = await Daemon.start(state, 0, core)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            stage = Stage(load, core, Path(name), session, daemon)
            try:
                os.sched_setaffinity(0, cores - {core})
                return await _perform(stage)
            finally:
                os.sched_setaffinity(0, cores)
                for crew in stage.crews.values():
                    crew.stop()
                # While the coordinator is there: what they have said leaves at once then.
                await asyncio.gather(*(worker.control.destroy() for worker in stage.workers.values()))
                await stage.daemon.stop()


async def _perform(stage: Stage) -> dict[str, Any]:
    load, problems = stage.load, stage.problems
    begin = time.monotonic()
    await stage.join()
    joined = time.monotonic() - begin
    await stage.submit()
    await stage.until_training()
    async with stage.watched():
        await asyncio.sleep(load.warm_up)
        found = await _under_load(stage)
        found |= {"joined_seconds": round(joined, 2), **await _killed(stage)}
        found["refused_reads"] = stage.meters.refused
    found["problems"] = problems[:20]
    return found


async def _under_load(stage: Stage) -> dict[str, Any]:
    """The figures of the measured time."""
    heartbeats, reports = (Histogram(stage.folder / name) for name in ("heartbeats", "reports"))
    lag = Histogram()
    for each in (heartbeats, reports, stage.meters):
        each.clear()
    process = psutil.Process(stage.daemon.process.pid)
    disturbance, used, begin = Disturbance(), sum(process.cpu_times()[:2]), time.monotonic()
    resident: list[tuple[float, int]] = []
    while (now := time.monotonic() - begin) < stage.load.seconds:
        if not resident or now - resident[-1][0] >= 1:
            resident.append((now, process.memory_info().rss))
        due = time.monotonic() + 0.02
        await asyncio.sleep(0.02)
        lag.add(max(0.0, time.monotonic() - due))
    sizes = [size / 2**20 for _, size in resident]
    return {
        "seconds": round(now, 1),
        "reads": stage.meters.reads.summary(),
        "reads_by_route": {route: each.summary() for route, each in sorted(stage.meters.by_route.items())},
        "heartbeats": heartbeats.summary(),
        "reports": reports.summary(),
        "shown": stage.meters.shown.summary(),
        "load_generator_lag": lag.summary(),
        "resident_mib": {"first": sizes[0], "last": sizes[-1], "most": max(sizes), **slopes(resident)},
        "core_share": (sum(process.cpu_times()[:2]) - used) / now,
        "others_cores": disturbance.cores(),
    }


def slopes(resident: list[tuple[float, int]]) -> dict[str, float]:
    """MiB a minute by which the resident set grew: over the whole time, and over its second half."""
    found = {}
    for name, part in (("per_minute", resident), ("per_minute_second_half", resident[len(resident) // 2 :])):
        minutes, sizes = [at / 60 for at, _ in part], [size / 2**20 for _, size in part]
        found[name] = linear_regression(minutes, sizes).slope if len(part) > 2 else 0.0
    return found


async def _killed(stage: Stage) -> dict[str, Any]:
    """Kill the coordinator under load, start it again, and compare what it had told with what it knows."""
    told, daemon = stage.told, stage.daemon
    for viewer in stage.viewers:
        viewer.away = True
    begin = time.monotonic()
    await daemon.kill()
    # What was on its way when it died is acknowledged once it is here: the streams are read to their ends.
    async with asyncio.timeout(10):
        await asyncio.gather(*(viewer.cut_off.wait() for viewer in stage.viewers))
    events, steps = dict(told.events), {job: dict(steps) for job, steps in told.steps.items()}
    with contextlib.closing(sqlite3.connect(f"file:{stage.state / 'coordinator.sqlite3'}?mode=ro", uri=True)) as store:
        kept = {seq: json.loads(data)["message"] for seq, data in store.execute("SELECT seq, data FROM events")}
        known = {(job, step): json.loads(data)["loss"] for job, step, data in store.execute("SELECT * FROM metrics")}
    lost = [f"event {seq}: {message}" for seq, message in events.items() if kept.get(seq) != message]
    flat = {(job, step): loss for job, steps in steps.items() for step, loss in steps.items()}
    lost += [f"step {step} of {job}" for (job, step), loss in flat.items() if known.get((job, step)) != loss]
    stage.daemon = await Daemon.start(stage.state, int(daemon.url.rpartition(":")[2]), stage.core)
    started, sent_after = time.monotonic(), stamp()
    async with asyncio.timeout(BACK_SECONDS):
        await stage.until_all_are_heard(sent_after)
        heard = time.monotonic()
        await stage.until_training(beyond=max((step for _, step in flat), default=0))
    for viewer in stage.viewers:
        viewer.away = False
    shown: dict[int, dict[str, Any]] = {}
    while page := (await stage.call("GET", f"/api/v1/events?after={max(shown, default=0)}"))["events"]:
        shown |= {event["seq"]: event for event in page}
    lost += [
        f"event {seq} is not shown any more" for seq, message in events.items() if shown[seq]["message"] != message
    ]
    gaps = []
    for job in stage.crews:
        metrics = (await stage.call("GET", f"/api/v1/jobs/{job}/metrics"))["metrics"]
        if [metric["step"] for metric in metrics] != list(range(1, len(metrics) + 1)):
            gaps.append(job)
    unwanted = [
        event["message"] for event in shown.values() if event["event"] in ("worker-lost", "adoption", "restarted")
    ]
    stage.problems += unwanted + told.contradictions
    return {
        "told_events": len(events),
        "told_steps": len(flat),
        "lost_after_kill": lost,
        "jobs_with_gaps": gaps,
        "started_again_seconds": started - begin,
        "all_heard_again_seconds": heard - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long is measured, after a warm-up")
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=10, help="running at the same time")
    parser.add_argument("--crew", type=int, default=40, help="workers of one job")
    parser.add_argument(
        "--step-seconds", type=float, default=1.0, help="a job's step; short ones show what is kept of each"
    )
    asked = parser.parse_args()
    if asked.jobs * asked.crew > asked.workers:
        parser.error(f"{asked.jobs} jobs of {asked.crew} workers need more than {asked.workers} workers")
    load = Load(asked.workers, asked.viewers, asked.crew, asked.jobs, asked.step_seconds, seconds=60 * asked.minutes)
    before = machine()
    found = asyncio.run(measure(load))
    report(
        # Another load must not take the place of the record of the one that has goals.
        "coordinator" if load == Load() else "coordinator_other_load",
        f"Coordinator: {load.workers} workers, {load.viewers} viewers",
        *table(found),
        {"machine": before, "load": asdict(load), **found},
    )
    if found["lost_after_kill"] or found["jobs_with_gaps"] or found["problems"]:
        raise SystemExit(
            f"not as it should be: {found['lost_after_kill'] + found['jobs_with_gaps'] + found['problems']}"
        )


def table(found: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows for people."""

    def times(what: dict[str, float]) -> tuple[str, ...]:
        return (f"{what['count']:.0f}", *(f"{what[name]:.1f}" for name in ("median_ms", "p99_ms", "worst_ms")))

    memory, nothing = found["resident_mib"], ("", "")
    rows = [
        ("API reads, ms", *times(found["reads"])),
        *((f"  {route}", *times(each)) for route, each in found["reads_by_route"].items()),
        ("heartbeat: from its worker until it is counted, ms", *times(found["heartbeats"])),
        ("step report: from its worker until it is in the store, ms", *times(found["reports"])),
        ("step: from its last report until a page has it, ms", *times(found["shown"])),
        ("load generator's own lag, ms", *times(found["load_generator_lag"])),
        ("share of its core", f"{found['core_share']:.0%}", *nothing, ""),
        ("other programs, cores", f"{found['others_cores']:.1f}", *nothing, ""),
        ("memory at first, at last, at most, MiB", *(f"{memory[name]:.1f}" for name in ("first", "last", "most")), ""),
        (
            "it grows by MiB a minute; in the second half",
            f"{memory['per_minute']:.1f}",
            f"{memory['per_minute_second_half']:.1f}",
            *nothing,
        ),
        ("told before the kill: events, steps", f"{found['told_events']}", f"{found['told_steps']}", *nothing),
        ("of these missing after the restart", f"{len(found['lost_after_kill'])}", *nothing, ""),
        ("all workers heard again, seconds after the start", f"{found['all_heard_again_seconds']:.1f}", *nothing, ""),
    ]
    return ("what", "count", "median", "p99", "worst"), rows


if __name__ == "__main__":
    main()
