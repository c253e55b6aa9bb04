"""One job on this worker, from `Prepare` until it is dropped: fragments, connections, snapshots, what stands by.

Belongs to the event loop; computing, moving tensors and hashing snapshots have threads of their own.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import traceback
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from time import monotonic
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from executor.staging import Stager
from fusion.errors import FusionError, PlanError
from fusion.messages import (
    Adopt,
    Backup,
    BackupFailed,
    CantAdopt,
    Check,
    CheckVoid,
    Commit,
    Connect,
    Failure,
    PeerAddress,
    PeerLost,
    Prepare,
    Ready,
    Start,
)
from fusion.units import format_bytes, format_seconds, plural
from fusion.wire import FrameKind, Header
from worker.jobs.assembly import Assembly, Piece, assemble
from worker.jobs.backups import Backups
from worker.jobs.connecting import HANDSHAKE_PATIENCE, Connecting
from worker.jobs.events import Switch
from worker.jobs.explain import explain, ran_out_of_memory
from worker.jobs.fetch import Fetcher
from worker.jobs.host import JobHost
from worker.jobs.job_parts import Parts
from worker.jobs.part_uploads import PartUploads
from worker.jobs.standby import Standby
from worker.machine import cores
from worker.machine.memory import MemoryGuard
from worker.transport.arrival import Received, tensor_of
from worker.transport.mover import Mover
from worker.transport.route import Route
from worker.transport.surroundings import Surroundings

_READY_AGAIN = 5.0
_CHECK = "spot check"
_LANES = 8
"""At most so many micro-batches are replayed at the same time: Python runs one at a time between operators."""
_SNAPSHOTS = frozenset({FrameKind.SNAPSHOT, FrameKind.SNAPSHOT_WANT})

log = logging.getLogger("fusion.worker")

Order = Start | Backup | Commit | Adopt | Check | Connect


class JobRun:
    """`prepare` first, then `take` for each order of the coordinator, `drop` at the end.

    `send` passes a report on to the coordinator and `say` a line to the person at this machine; both in the event loop.
    """

    def __init__(
        self,
        prepare: Prepare,
        worker: str,
        *,
        device: str,
        threads: int,
        fetcher: Fetcher,
        mover: Mover,
        memory: MemoryGuard,
        send: Callable[[BaseModel], None],
        say: Callable[[str], None],
        surroundings: Surroundings | None = None,
    ) -> None:
        self.job = prepare.job
        self._prepare = prepare
        self._worker = worker
        self._device = device
        self._threads = threads
        self._fetcher = fetcher
        self._mover = mover
        self._memory = memory
        self._surroundings = surroundings
        self._send = send
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._orders: asyncio.Queue[Order] = asyncio.Queue()
        self._abandoned = threading.Event()
        self._started = False
        self._backup_workers: Mapping[int, str] = prepare.backups
        """Fragment -> its backup worker, as ordered last."""
        self._connecting = Connecting(prepare, worker, mover, send, self._abandoned.is_set)
        self._parts: Parts | None = None
        self._assembling: asyncio.Task[tuple[Assembly, dict[int, Piece]]] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._begin(self._make_ready(), f"prepare {self.job}")

    @property
    def training(self) -> bool:
        """Whether there is something to lose."""
        return self._parts is not None

    def is_about(self, prepare: Prepare) -> bool:
        """Whether this has been getting ready, or is, for the same run with the same peers."""
        return not self._started and prepare == self._prepare

    def take(self, order: Order) -> None:
        """An order of the coordinator for this job; they are followed one after the other."""
        if isinstance(order, Adopt):
            self._connecting.newest = max(self._connecting.newest, order.plan.epoch)
        self._orders.put_nowait(order)

    async def drop(self, why: str) -> None:
        """Stop computing, close the job's connections, free its memory."""
        self._abandoned.set()
        if self._assembling is not None:
            self._assembling.cancel()  # It may be in the middle of a long download.
        # A thread that waits for handshakes sees the event; cancelling would leave its connections behind.
        preparing, *others = self._tasks
        for task in others:
            task.cancel()
        await asyncio.gather(preparing, *others, return_exceptions=True)
        parts, self._parts = self._parts, None
        if parts is None:
            self._mover.forget_peers()
        else:
            await parts.close()
            await asyncio.to_thread(self._mover.close_route, parts.route)
            log.info("dropped job %s: %s", self.job, why)
            del parts
            gc.collect()  # The next job needs the memory; optimizers hold on to themselves.

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """A task that `drop` ends and waits for."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            assert isinstance(error, Exception)
            self._fail(error, self._prepare.plan.epoch if self._parts is None else self._parts.host.epoch)

    # Getting ready -------------------------------------------------------------------------------------------------

    async def _make_ready(self) -> None:
        prepare = self._prepare
        begin = monotonic()
        before = self._fetcher.fetched_bytes
        peers = self._connecting.others(prepare.peers)
        self._mover.admit(peers)
        try:
            parts = self._parts = await self._build(peers)
        except Exception as error:
            self._fail(error, prepare.plan.epoch)
            return
        if self._abandoned.is_set():
            return
        if not parts.host.hosted:
            # A newcomer to a job that is running: it takes part in pauses before it gets its first fragments.
            parts.host.start(parts.route)
            self._started = True
        fetched = self._fetcher.fetched_bytes - before
        ready = Ready(job=prepare.job, epoch=prepare.plan.epoch, fetched_bytes=fetched)
        self._send(ready)
        self._begin(self._follow(parts), f"orders {self.job}")
        self._begin(self._poke(parts.backups, ready), f"poke {self.job}")
        hosted = prepare.plan.fragments_of(self._worker)
        self._say(
            f"job {prepare.job}: "
            + (
                f"{plural('fragment', len(hosted))} {', '.join(map(str, hosted))} of {len(prepare.plan.placement)} ready"
                if hosted
                else "ready to take fragments over"
            )
            + f" in {format_seconds(monotonic() - begin)} ({format_bytes(fetched)} fetched)"
        )

    async def _build(self, peers: list[PeerAddress]) -> Parts:
        prepare = self._prepare
        self._assembling = asyncio.create_task(
            assemble(prepare, self._worker, self._device, self._fetcher, self._memory), name=f"assemble {self.job}"
        )
        assembly, pieces = await self._assembling
        self._assembling = None  # It would keep the pieces, which may move away.
        open_route: Route | None = None

        def transmit(to: str, header: Header, payload: memoryview | None) -> None:
            if open_route is not None:
                open_route.send_bytes(to, header, payload)

        def deliver(header: Header, sender: str, value: Received) -> None:
            if header.kind in _SNAPSHOTS:
                backups.handle(header, sender, tensor_of(value))
            else:
                host.deliver(header, sender, value)

        def ship(fragment: int, step: int, to: str, state: dict[str, Tensor]) -> None:
            backups.offer(fragment, step, to, state)

        host = JobHost(
            assembly,
            pieces,
            threads=self._threads,
            memory=self._memory,
            report=self._report_from_thread,
            upload=PartUploads(self.job, self._fetcher, self._send, lambda: host.epoch, self._abandoned.is_set).begin,
            ship=ship,
            stager=Stager(torch.device(self._device)) if self._device != "cpu" else None,
            surroundings=self._surroundings,
            lanes=min(_LANES, cores.count() // self._threads),
        )
        fragments = assembly.partition.fragments
        backups = Backups(
            self.job,
            assembly.dag,
            fragments,
            self._memory,
            transmit,
            self._report_from_thread,
            lambda: host.epoch,
            self._later,
            host.fail,
        )
        standby = Standby(assembly, self._device, self._fetcher, self._memory, self._not_standing_by)
        open_route = await asyncio.to_thread(
            self._mover.open,
            assembly.admission(),
            peers,
            deliver,
            places=host.places,
            on_error=host.fail,
            on_spoilt=host.spoilt,
            on_peer_lost=self._peer_lost,
            on_peer_back=host.peer_back,
            silence=prepare.failure_timeout,
            patience=HANDSHAKE_PATIENCE,
            cancelled=self._abandoned.is_set,
        )
        return Parts(host, open_route, backups, standby)

    def _fail(self, error: Exception, epoch: int) -> None:
        """The job can't go on here."""
        detail = "" if isinstance(error, FusionError) else "".join(traceback.format_exception(error))
        failure = Failure(job=self.job, epoch=epoch, message=explain(error), detail=detail)
        self._say(f"job {self.job}: {failure.message}")
        self._send(failure)

    # Orders --------------------------------------------------------------------------------------------------------

    async def _follow(self, parts: Parts) -> None:
        while True:
            order = await self._orders.get()
            try:
                await self._carry_out(parts, order)
            except Exception as error:
                # Without its orders the job would go on here as if all were well.
                self._fail(error, parts.host.epoch)

    async def _carry_out(self, parts: Parts, order: Order) -> None:
        match order:
            case Start():
                # It comes again when it may have been lost.
                if order.epoch == parts.host.epoch and not self._started:
                    self._started = True
                    self._say(f"job {self.job}: training starts")
                    parts.host.start(parts.route)
                    parts.stand_by(self._backup_workers)
            case Backup():
                parts.backups.spread(order.seconds)
                parts.host.post(order)
                self._backup_workers = order.backups
            case Commit():
                parts.host.post(order)
                if parts.backups.commit(order.step):
                    # Not as soon as backup workers are named: that is right after a loss, when others catch up.
                    parts.stand_by(self._backup_workers)
            case Check():
                # Beside the orders to come: a snapshot takes a while to read, a fragment to build.
                self._tasks = [task for task in self._tasks if task.get_name() != _CHECK or not task.done()]
                self._begin(self._check(parts, order), _CHECK)
            case Connect():
                await self._connecting.to(parts.route, order.peers)
            case Adopt():
                await self._adopt(parts, order)

    async def _adopt(self, parts: Parts, order: Adopt) -> None:
        """Follow another plan; what is new here is put in place first."""
        host, route = parts.host, parts.route
        if order.plan.epoch <= host.epoch:
            return
        hosted = order.plan.fragments_of(self._worker)
        try:
            added = [fragment for fragment in hosted if fragment not in host.hosted]
            admission = host.assembly.admission(order.plan)
            self._mover.require_room(admission)
            pieces = {fragment: await parts.install(fragment, order.step) for fragment in added}
        except Exception as error:
            if not isinstance(error, FusionError):
                log.exception("could not adopt a fragment of job %s", self.job)
            self._send(CantAdopt(job=self.job, epoch=order.plan.epoch, message=explain(error)))
            return
        if not await self._connecting.as_planned(route, order):
            self._begin(self._connecting.at_last(route, order, host.peer_back), f"connect {self.job}")
        route.admission = admission
        for fragment in set(host.hosted) - set(hosted):
            parts.backups.keep(fragment, order.step)
        parts.backups.abandon(order.step)
        host.hosted = hosted
        host.post(Switch(order.plan, order.step, pieces))
        if order.step > host.assembly.first_step - 1:
            parts.backups.commit(order.step)
        if pieces:
            names = ", ".join(map(str, pieces))
            self._say(f"job {self.job}: took over {plural('fragment', len(pieces))} {names} after step {order.step}")
        self._backup_workers = order.backups

    async def _check(self, parts: Parts, order: Check) -> None:
        """Take part in a spot check."""
        held = await parts.testify(order)
        if order.checker != self._worker:
            return
        try:
            await parts.examine(order, held)
        except Exception as error:
            if not isinstance(error, FusionError):
                log.exception("could not check a fragment of job %s", self.job)
            self._send(
                CheckVoid(
                    job=self.job,
                    epoch=order.epoch,
                    fragment=order.fragment,
                    through=order.through,
                    message=explain(error),
                )
            )

    def _not_standing_by(self, fragment: int, error: BaseException) -> None:
        # What a fragment of a plan that fits fails for otherwise may be over when it is needed, and built once more.
        if not (isinstance(error, PlanError) or ran_out_of_memory(error)):
            unexpected = None if isinstance(error, FusionError) else error
            log.warning(
                "could not build fragment %d of job %s ahead of need: %s",
                fragment,
                self.job,
                explain(error),
                exc_info=unexpected,
            )
        elif self._parts is not None:
            host = self._parts.host
            self._send(
                BackupFailed(
                    job=self.job,
                    epoch=host.epoch,
                    step=host.assembly.first_step,
                    fragment=fragment,
                    cause="memory",
                    message=explain(error),
                )
            )

    async def _poke(self, backups: Backups, ready: Ready) -> None:
        said_at = monotonic()
        while True:
            await asyncio.sleep(1.0)
            backups.poke()
            if not self._started and monotonic() - said_at >= _READY_AGAIN:
                # The answer may have been lost with a connection that broke.
                said_at = monotonic()
                self._send(ready)

    # From other threads --------------------------------------------------------------------------------------------

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # The worker ends: its loop is closed.
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, call)

    def _report_from_thread(self, message: BaseModel) -> None:
        self._loop.call_soon_threadsafe(self._send, message)

    def _peer_lost(self, peer: str) -> None:
        self._report_from_thread(PeerLost(job=self.job, peer=peer))
