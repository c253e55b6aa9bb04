"""The dashboard with a large pool and a long run: time of its pages in Chromium, memory and answers of the coordinator.

`python benchmarks/dashboard.py [--workers 200] [--points 100000] [--seconds 10]`. The coordinator is a process of its own; its
workers are played over their real control channels, a running job reports ten steps a second, and the pages are watched live.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "coordinator"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "browser"))

import aiohttp
import psutil
from browser_cases import ShownWorker, Tab, a_browser, a_tab
from coordinator_cases import Server, serving

from benchmarks.common import machine, report
from coordinator.entry import access
from coordinator.life.books import Timing
from coordinator.life.jobs import Metric
from coordinator.storage.store import Store

PATIENT = Timing(failure_timeout=120.0)
STEPS_PER_SECOND = 10

# How smooth a page is: the longest task of its thread, and frames in a second, both while it is followed live.
WATCH = """async seconds => {
    const tasks = [];
    new PerformanceObserver(list => tasks.push(...list.getEntries().map(entry => entry.duration))).observe({type: "longtask"});
    let frames = 0;
    const begin = performance.now(), end = begin + seconds * 1000;
    await new Promise(done => { const count = now => { frames += 1; now < end ? requestAnimationFrame(count) : done(); };
        requestAnimationFrame(count); });
    return {longest_task_ms: Math.max(0, ...tasks), busy_share: tasks.reduce((sum, each) => sum + each, 0) / (seconds * 1000),
        frames_per_second: frames / seconds, heap_mib: performance.memory.usedJSHeapSize / 2 ** 20};
}"""


async def serve(state: Path) -> None:
    """The coordinator's process: prints its address, ends with its standard input."""
    async with serving(state, timing=PATIENT) as server:
        print(server.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def write_history(state: Path, points: int) -> str:
    """A job that has ended after so many steps; returns its id."""
    async with serving(state, timing=PATIENT) as server, ShownWorker(server, "first") as worker:
        worker.pause_after = 1
        job = await server.submit(train={"steps": points})
        await server.until(job["id"], lambda shown: shown["step"] == 1)
        await server.call("POST", f"/api/v1/jobs/{job['id']}/cancel")
        await server.until_state(job["id"], "cancelled")
        await server.call("POST", "/api/v1/workers/first/drain")
        await worker.evicted.wait()
    store = Store(state / "coordinator.sqlite3")
    for step in range(2, points + 1):
        noise = (step * 2654435761 % 1000) / 1000
        values = {"loss": 5 / step**0.2 + 0.2 * noise, "step_seconds": 0.1 + 0.02 * noise, "gradient_norm": 1 + noise}
        store.add_metric(job["id"], Metric(step=step, sent_bytes=1 << 20, epoch=0, tokens=4096, **values))
    [record] = store.jobs()
    record.step, record.loss = points, 0.5
    store.save_job(record)
    store.close()
    return str(job["id"])


@contextlib.asynccontextmanager
async def coordinator(state: Path) -> AsyncIterator[tuple[Server, psutil.Process]]:
    """The coordinator as a child process, and a handle for playing workers."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve", str(state), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    url = (await child.stdout.readline()).decode().strip()
    try:
        async with aiohttp.ClientSession() as session:
            yield Server(None, None, access.load(state), url, session), psutil.Process(child.pid)  # type: ignore[arg-type]
    finally:
        child.stdin.close()
        await child.wait()


async def answers(server: Server, path: str, seconds: float) -> list[float]:
    """Milliseconds of one read after the other, for so long."""
    found = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        await server.call("GET", path)
        found.append((time.perf_counter() - begin) * 1000)
        await asyncio.sleep(0.02)
    return found


async def opened(tab: Tab, address: str, ready: str) -> float:
    """Milliseconds until a page shows what `ready` waits for."""
    begin = time.perf_counter()
    await tab.page.goto(address)
    await tab.until(ready)
    return (time.perf_counter() - begin) * 1000


async def measure(workers: int, points: int, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"workers": workers, "points": points}
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        history = await write_history(state, points)
        async with coordinator(state) as (server, process), contextlib.AsyncExitStack() as stack:
            found["memory_idle_mib"] = process.memory_info().rss / 2**20
            played = [ShownWorker(server, f"worker-{number:03}", memory=8 << 30) for number in range(workers)]
            for worker in played:
                await stack.enter_async_context(worker)
                worker.pause_after = 0
            body = await server.submission(name="live", train={"steps": 10**6}, plan={"workers": 1})
            _, live = await server.call("POST", "/api/v1/jobs", json=body)
            pacing = asyncio.create_task(keep_pace(played))
            stack.callback(pacing.cancel)
            begin = time.perf_counter()
            _, curves = await server.call("GET", f"/api/v1/jobs/{history}/curves")
            found["curves_first_ms"] = (time.perf_counter() - begin) * 1000
            found["curves_buckets"] = len(curves["first_step"])
            begin = time.perf_counter()
            await server.call("GET", f"/api/v1/jobs/{history}/curves")
            found["curves_again_ms"] = (time.perf_counter() - begin) * 1000
            browser = await stack.enter_async_context(a_browser())
            tab = await stack.enter_async_context(a_tab(browser))
            count = f"() => document.querySelectorAll('svg.topology g.worker').length === {workers}"
            found["pool_page_ms"] = await opened(tab, f"{server.url}/#/", count)
            reads = asyncio.create_task(answers(server, "/api/v1/workers", seconds))
            found["pool_page"] = await tab.page.evaluate(WATCH, seconds)
            times = await reads
            found["read_ms"] = {"median": median(times), "p99": quantiles(times, n=100)[98]}
            drawn = "() => document.querySelector('svg.chart path.line')"
            found["job_page_ms"] = await opened(tab, f"{server.url}/?#/job/{history}", drawn)
            await opened(tab, f"{server.url}/?live#/job/{live['id']}", drawn)
            found["live_job_page"] = await tab.page.evaluate(WATCH, seconds)
            found["problems"] = tab.problems
            found["memory_mib"] = process.memory_info().rss / 2**20
            found["processor_share"] = await asyncio.to_thread(process.cpu_percent, 5)
    return found


async def keep_pace(workers: list[ShownWorker]) -> None:
    for step in range(1, 10**6):
        for worker in workers:
            worker.pause_after = step
        await asyncio.sleep(1 / STEPS_PER_SECOND)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each page is followed live")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve is not None:
        asyncio.run(serve(asked.serve))
        return
    load = os.getloadavg()[0]
    found = asyncio.run(measure(asked.workers, asked.points, asked.seconds))
    rows = [
        (f"pool page, until all {asked.workers} workers are drawn", f"{found['pool_page_ms']:.0f} ms"),
        ("pool page, live: longest task", f"{found['pool_page']['longest_task_ms']:.0f} ms"),
        ("pool page, live: frames a second", f"{found['pool_page']['frames_per_second']:.0f}"),
        (f"job page with {asked.points:,} steps, until its curves are drawn", f"{found['job_page_ms']:.0f} ms"),
        ("job page, live at ten steps a second: longest task", f"{found['live_job_page']['longest_task_ms']:.0f} ms"),
        ("job page, live: frames a second", f"{found['live_job_page']['frames_per_second']:.0f}"),
        ("curves, first read after a start", f"{found['curves_first_ms']:.0f} ms"),
        ("curves, read again", f"{found['curves_again_ms']:.0f} ms"),
        ("read of all workers meanwhile, p99", f"{found['read_ms']['p99']:.0f} ms"),
        ("coordinator's memory, idle", f"{found['memory_idle_mib']:.0f} MiB"),
        ("coordinator's memory, with workers, curves and a viewer", f"{found['memory_mib']:.0f} MiB"),
        ("coordinator's share of a core", f"{found['processor_share']:.0f} %"),
    ]
    title = f"Dashboard: {asked.workers} workers, {asked.points:,} metric points"
    report("dashboard", title, ("what", "measured"), rows, {"machine": {**machine(), "load_before": load}, **found})


if __name__ == "__main__":
    main()
