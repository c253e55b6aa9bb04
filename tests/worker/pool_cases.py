"""Workers in this event loop against a fake coordinator: what the tests of their life share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fake_coordinator import FakeCoordinator
from worker_cases import Case

from fusion.messages import Failure, Heartbeat, PeerAddress, Prepare, Ready, Start
from worker.config import WorkerConfig
from worker.service import Service


class Said(list[str]):
    """What a worker prints; `until` waits for a line."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.append(line)
        self._changed.set()

    async def until(self, part: str) -> str:
        async with asyncio.timeout(60):
            while not (found := [line for line in self if part in line]):
                self._changed.clear()
                await self._changed.wait()
        return found[0]


@dataclass
class Running:
    """A worker in this event loop."""

    service: Service
    task: asyncio.Task[int]
    said: Said


def start_worker(url: str, name: str, **options: Any) -> Running:
    said = Said()
    service = Service(WorkerConfig(join=url, name=name, **options), said)
    return Running(service, asyncio.create_task(service.run()), said)


async def end(worker: Running) -> None:
    worker.service._over.set()
    await asyncio.gather(worker.task, return_exceptions=True)


@asynccontextmanager
async def pool(coordinator: FakeCoordinator, *names: str) -> AsyncIterator[list[Running]]:
    torch.set_num_threads(1)
    workers = [start_worker(coordinator.url, name) for name in names]
    try:
        for name in names:
            await coordinator.message(name, Heartbeat)
        yield workers
    finally:
        for worker in workers:
            await end(worker)


def addresses(coordinator: FakeCoordinator, *names: str) -> list[PeerAddress]:
    asked = {request.name: request for request in coordinator.joined}
    return [
        PeerAddress(worker=name, endpoint=asked[name].data_endpoint, public_key=asked[name].public_key)
        for name in dict.fromkeys(names)
    ]


def prepare_for(coordinator: FakeCoordinator, case: Case, placement: tuple[str, ...], **plan: Any) -> Prepare:
    prepare = case.prepare(placement, addresses(coordinator, *placement), **plan)
    coordinator.blobs.update(case.blobs)
    for name in prepare.plan.workers:
        coordinator.send(name, prepare)
    return prepare


async def ready_job(coordinator: FakeCoordinator, case: Case, placement: tuple[str, ...], **plan: Any) -> Prepare:
    prepare = prepare_for(coordinator, case, placement, **plan)
    for name in prepare.plan.workers:
        ready = await coordinator.message(name, Ready, Failure)
        assert isinstance(ready, Ready), ready
    return prepare


def launch(coordinator: FakeCoordinator, prepare: Prepare) -> None:
    for name in prepare.plan.workers:
        coordinator.send(name, Start(job=prepare.job, epoch=prepare.plan.epoch))


async def start_job(coordinator: FakeCoordinator, case: Case, placement: tuple[str, ...], **plan: Any) -> Prepare:
    prepare = await ready_job(coordinator, case, placement, **plan)
    launch(coordinator, prepare)
    return prepare
