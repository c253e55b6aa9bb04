"""Many dashboards in one process: the pool's event stream, and the reads that its pages make as often as they make them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import aiohttp

from benchmarks.histogram import Histogram

_AWAY = 0.5
"""Seconds until a page tries again, at first."""
_PAGE_SECONDS = 20.0
"""How long a person looks at one page."""


class Told:
    """What the coordinator has said to anybody: it is acknowledged, and must never be gone again."""

    def __init__(self) -> None:
        self.events: dict[int, str] = {}
        self.steps: dict[str, dict[int, float | None]] = defaultdict(dict)
        self.contradictions: list[str] = []

    def event(self, item: dict[str, Any]) -> None:
        if self.events.setdefault(item["seq"], item["message"]) != item["message"]:
            self.contradictions.append(f"event {item['seq']} was told in two ways: {item['message']}")

    def step(self, item: dict[str, Any]) -> None:
        if self.steps[item["job"]].setdefault(item["step"], item["loss"]) != item["loss"]:
            self.contradictions.append(f"step {item['step']} of {item['job']} was told in two ways")


class Meters:
    """How long answers took, in all and by route, and how long a step takes from its last report to a page."""

    def __init__(self) -> None:
        self.reads = Histogram()
        self.by_route: dict[str, Histogram] = defaultdict(Histogram)
        self.shown = Histogram()
        self.refused = 0
        """Answers that were no answer while a coordinator was there."""

    def clear(self) -> None:
        self.reads.clear()
        self.by_route.clear()
        self.shown.clear()


class Viewer:
    """One open dashboard. `reported_at(job, step)` is when the workers were through with a step, if that is known."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        jobs: list[str],
        told: Told,
        meters: Meters,
        reported_at: Callable[[str, int], float | None],
        seed: int,
    ) -> None:
        self._session = session
        self._url = url
        self._jobs = jobs
        self._told = told
        self._meters = meters
        self._reported_at = reported_at
        self._random = random.Random(seed)
        self._last_event = 0
        self.away = False
        """The coordinator is known to be gone: failures are not counted."""
        self.cut_off = asyncio.Event()
        """No stream is open: all that came over the last one has been read."""
        self.cut_off.set()

    async def watch(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._browse())

    async def read(self, path: str, route: str | None = None) -> Any:
        """The JSON of a read; None when there was no answer."""
        begin = time.monotonic()
        try:
            async with self._session.get(f"{self._url}{path}") as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError):
            self._meters.refused += not self.away
            return None
        spent = time.monotonic() - begin
        self._meters.reads.add(spent)
        self._meters.by_route[route or path].add(spent)
        if response.status != 200:
            self._meters.refused += 1
            return None
        return json.loads(body) if response.content_type == "application/json" else body

    async def _listen(self) -> None:
        while True:
            with suppress(aiohttp.ClientError, OSError):
                timeout = aiohttp.ClientTimeout(total=None, sock_read=10)
                async with self._session.get(f"{self._url}/api/v1/stream", timeout=timeout) as response:
                    self.cut_off.clear()
                    catching_up = asyncio.create_task(self._catch_up())
                    rest = b""
                    async for chunk in response.content.iter_any():
                        *items, rest = (rest + chunk).split(b"\n\n")
                        for item in items:
                            self._hear(item)
                    await catching_up
            self.cut_off.set()
            await asyncio.sleep(_AWAY)

    def _hear(self, item: bytes) -> None:
        if item.startswith(b"event: metrics\n"):
            data = json.loads(item.partition(b"data: ")[2])
            self._told.step(data)
            at = self._reported_at(data["job"], data["step"])
            if at is not None:
                self._meters.shown.add(time.monotonic() - at)
        elif item.startswith(b"event: event\n"):
            data = json.loads(item.partition(b"data: ")[2])
            self._last_event = max(self._last_event, data["seq"])
            self._told.event(data)

    async def _catch_up(self) -> None:
        """What happened while nobody listened."""
        found = await self.read(f"/api/v1/events?after={self._last_event}&newest=500", "/api/v1/events")
        for event in found["events"] if found else ():
            self._told.event(event)

    async def _browse(self) -> None:
        pages = (self._pool_page, self._curves_tab, self._pipeline_tab, self._plan_tab)
        await asyncio.sleep(self._random.random())
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PAGE_SECONDS * (0.5 + self._random.random())):
                    await self._random.choice(pages)(f"/api/v1/jobs/{self._random.choice(self._jobs)}")

    async def _pool_page(self, job: str) -> None:
        while True:
            await self.read("/api/v1/map")
            await asyncio.sleep(5)

    async def _curves_tab(self, job: str) -> None:
        await self.read(f"{job}/curves", "/api/v1/jobs/{id}/curves")
        await asyncio.sleep(3600)

    async def _pipeline_tab(self, job: str) -> None:
        while True:
            await self.read(f"{job}/timeline", "/api/v1/jobs/{id}/timeline")
            await asyncio.sleep(2)

    async def _plan_tab(self, job: str) -> None:
        while True:
            await asyncio.gather(
                self.read(f"{job}/links", "/api/v1/jobs/{id}/links"),
                self.read(f"{job}/plans", "/api/v1/jobs/{id}/plans"),
            )
            await asyncio.sleep(3)

    async def scrape(self) -> None:
        """Not a page: a monitoring system, and a terminal with `fusion top`."""
        while True:
            await asyncio.gather(self.read("/metrics"), self.read("/api/v1/workers"), self.read("/api/v1/jobs"))
            await asyncio.sleep(2)
