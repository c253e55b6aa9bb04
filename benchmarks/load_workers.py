"""Many workers in one process: real control channels, heartbeats at the real interval, and jobs that only count their steps."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import aiohttp

from benchmarks.watched_coordinator import stamp
from fusion.errors import FusionError
from fusion.messages import (
    Backup,
    BackupFailed,
    Commit,
    Connect,
    Connected,
    Device,
    FragmentTimes,
    Holding,
    JoinRequest,
    JoinResponse,
    Prepare,
    Ready,
    Start,
    StepReport,
    StepTrace,
    Stop,
    ToWorker,
)
from fusion.plan import Plan
from fusion.sockets import new_keys
from fusion.wire import PROTOCOL_VERSION
from worker.control import Control

MICRO_BATCHES = 8
_TRACED = (1, 2)
"""Of eight steps, those that come with a trace."""


class Crew:
    """The workers of one job. Each step takes them the same time, and its reports come in the order of the pipeline."""

    def __init__(self, job: str, pool: Mapping[str, LoadWorker], step_seconds: float) -> None:
        self.job = job
        self.step = 0
        self.plan: Plan | None = None
        self.reported_at: dict[int, float] = {}
        """Step -> when the last worker reported it."""
        self._pool = pool
        self._step_seconds = step_seconds
        self._order: Backup | None = None
        self._training: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._training is None:
            self._training = asyncio.create_task(self._train(), name=f"crew of {self.job}")

    def stop(self) -> None:
        if self._training is not None:
            self._training.cancel()

    def ordered(self, order: Backup, worker: LoadWorker) -> None:
        """Everybody hears of a round; one of them is enough to remember it, or to say that it came too late."""
        if self._order is not None and self._order.step == order.step:
            return
        if order.step <= self.step and self.plan is not None:
            fragment = self.plan.fragments_of(worker.name)[0]
            worker.control.send(
                BackupFailed(job=self.job, epoch=order.epoch, step=order.step, fragment=fragment, cause="passed")
            )
            return
        self._order = order

    async def _train(self) -> None:
        assert self.plan is not None
        # Jobs don't march in step with each other.
        due = time.monotonic() + random.Random(self.job).random() * self._step_seconds
        while True:
            due += self._step_seconds
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            step = self.step + 1
            for name in self.plan.workers:
                self._pool[name].report(self, step)
                await asyncio.sleep(0)
            self.step = step
            self.reported_at[step] = time.monotonic()
            self.reported_at.pop(step - 1000, None)
            if (order := self._order) is not None and order.step <= step:
                self._order = None
                for fragment, holder in order.backups.items():
                    self._pool[holder].control.send(
                        Holding(job=self.job, epoch=order.epoch, step=order.step, fragment=fragment, bytes=1 << 20)
                    )
                    await asyncio.sleep(0)


class LoadWorker:
    """One worker: what its control channel hears and says is real, what it computes is not."""

    def __init__(self, name: str, crew_of: Callable[[str], Crew], problems: list[str]) -> None:
        self.name = name
        self.plan: Plan | None = None
        self._crew_of = crew_of
        self._problems = problems
        self._keys = new_keys()
        self.control = Control(self._keys, self._hear, lambda there: None)
        self.control.memory_used = stamp

    async def join(self, session: aiohttp.ClientSession, url: str, token: str) -> None:
        """Join the pool and begin to send heartbeats. Raises `FusionError`."""
        asked = JoinRequest(
            name=self.name,
            protocol_version=PROTOCOL_VERSION,
            fusion_version="0",
            torch_version="2",
            # No limit: what it says of the memory in use is a stamp.
            device=Device(flops_per_second=1e9),
            data_endpoint="tcp://127.0.0.1:1",
            public_key=self._keys.public,
        )
        headers = {"Authorization": f"Bearer {token}"}
        body = asked.model_dump(mode="json")
        async with session.post(f"{url}/api/v1/workers", json=body, headers=headers) as response:
            answer = await response.json()
            if response.status != 201:
                raise FusionError(f"{self.name} could not join: {answer['error']}")
        self.control.open(JoinResponse.model_validate(answer))

    def _hear(self, message: ToWorker) -> None:
        match message:
            case Prepare():
                crew = self._crew_of(message.job)
                if crew.step:
                    self._problems.append(f"{self.name} was to begin {message.job} anew at step {crew.step}")
                crew.plan = self.plan = message.plan
                self.control.send(Ready(job=message.job, epoch=message.plan.epoch))
            case Start():
                self._crew_of(message.job).start()
            case Backup():
                self._crew_of(message.job).ordered(message, self)
            case Connect():
                self.control.send(Connected(job=message.job, peers=[peer.worker for peer in message.peers]))
            case Stop():
                self._crew_of(message.job).stop()
            case Commit():
                pass
            case _:
                self._problems.append(f"{self.name} was told: {message!r:.200}")

    def report(self, crew: Crew, step: int) -> None:
        """Tell of a step, as a worker with its share of a pipeline does."""
        plan = self.plan
        assert plan is not None
        mine, place = plan.fragments_of(self.name), plan.workers.index(self.name)
        around = [plan.workers[at] for at in (place - 1, place + 1) if 0 <= at < len(plan.workers)]
        last = len(plan.placement) - 1 in mine
        self.control.send(
            StepReport(
                job=crew.job,
                epoch=plan.epoch,
                step=step,
                fragments=[FragmentTimes(fragment=index, forward=0.3, backward=0.6, update=0.01) for index in mine],
                loss=1 / step if last else None,
                sent_bytes=1 << 20,
                sent_to=dict.fromkeys(around, 1 << 19),
                memory_used_bytes=stamp(),
                trace=_trace(mine[0], around) if step % 8 in _TRACED else None,
            )
        )


def _trace(fragment: int, around: list[str]) -> StepTrace:
    tasks: list[Any] = []
    for index in range(MICRO_BATCHES):
        tasks.append(("forward", fragment, index, 0.1 * index, 0.1 * index + 0.03))
        tasks.append(("backward", fragment, index, 0.1 * index + 0.03, 0.1 * index + 0.09))
    arrivals: list[Any] = [("activation", fragment, index, 0.1 * index, around[0]) for index in range(MICRO_BATCHES)]
    now = time.time()
    return StepTrace(begun=now - 1, told=now, tasks=tasks, arrivals=arrivals if around else [])
