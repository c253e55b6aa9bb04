"""The coordinator's one mutable thing: feeds events to the life cycle and carries its instructions out.

Everything here runs on the event loop's thread, except what is handed to `asyncio.to_thread` (planning, checkpoints).
All writes that one event causes are one transaction. While nothing can be written (a full disk, say), events and what is to be
said to workers wait in a backlog.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic

from coordinator.archive import Archive
from coordinator.background import Background
from coordinator.backlog import Backlog, CantRecordError
from coordinator.clock import Clock
from coordinator.config import CoordinatorConfig
from coordinator.control import Control
from coordinator.dags import Dags
from coordinator.entry.entrance import admit, holder
from coordinator.life import events as ev
from coordinator.life.jobs import Job
from coordinator.life.lifecycle import Lifecycle
from coordinator.life.links import Links
from coordinator.life.pool import Member
from coordinator.plans.planning import Planner
from coordinator.shown.observations import Observations
from coordinator.shown.publisher import Item, Publisher
from coordinator.shown.views import Submission, job_view, worker_view
from coordinator.storage.blobs import BlobStore
from coordinator.storage.checkpoints import Checkpoints
from coordinator.storage.copies import Copies
from coordinator.storage.store import Store
from coordinator.submission import accept
from dag.graph import OpDag
from fusion.errors import ServiceError
from fusion.messages import CheckpointPart, JoinRequest, StepReport, ToCoordinator, ToWorker
from fusion.relay.child import RelayProcess
from fusion.units import format_seconds, plural

logger = logging.getLogger(__name__)

TICK_SECONDS = 0.1
_RETRY_SECONDS = 1.0
_TURN_SECONDS = 0.005
"""What has waited may be much: people's requests are answered in between."""
_FAILING_TICKS = 50
"""In a row. Something that passes may fail a tick; what does not is left to a fresh process, which begins from the record."""


class Engine:
    """State, and what changes it. Call `start` in a running event loop, and `close` at the end."""

    def __init__(
        self,
        config: CoordinatorConfig,
        store: Store,
        blobs: BlobStore,
        checkpoints: Checkpoints,
        planner: Planner,
        clock: Callable[[], float] | None = None,
        copies: Copies | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.blobs = blobs
        self.checkpoints = checkpoints
        self.archive = Archive(store, blobs, checkpoints, self._awaited)
        self.publisher = Publisher()
        self.observations = Observations(store)
        self.lifecycle = Lifecycle(config.timing, Links(config.topology))
        self.clock = clock or Clock()
        self.started_at = self.clock()
        self._control: Control | None = None
        self._relay: RelayProcess | None = None
        self._dags = Dags(blobs, config.max_dag_bytes)
        self._unsaved: set[str] = set()
        self._backlog = Backlog()
        self._behind_since: float | None = None
        """When it was noticed that nothing can be written, in monotonic seconds; None while all is on record."""
        self._retry_at = 0.0
        self._news = asyncio.Event()
        """Set when all is on record again, or will not be any more; then another takes its place."""
        self._closing = False
        self.failing = asyncio.Event()
        """Set when only another process can go on; `close` raises why."""
        self._failure: str | None = None
        self._background = Background(
            self.lifecycle,
            planner,
            self.archive,
            checkpoints,
            self.dag,
            self.clock,
            self.post,
            self._send,
            self.recorded,
            copies,
        )
        self._ticking: asyncio.Task[None] | None = None
        self._submitting = asyncio.Lock()

    # Start and end ------------------------------------------------------------------------------------------------

    def admit_known(self, control: Control) -> None:
        """Let the workers of an earlier process in. Before the channel is bound: whoever is refused waits to try again."""
        for member in self.store.workers():
            control.admit(member.public_key, member.incarnation)
            if not member.live:
                control.forget(member.incarnation)

    def start(self, control: Control) -> None:
        """Take up what is in the store, and begin to tick and to listen to workers."""
        self._control, control.on_failure = control, self._deaf
        self.admit_known(control)
        self._carry_out(self.lifecycle.restore(self.store.jobs(), self.store.workers(), self.clock()))
        for job, why in self.store.unreadable.items():
            words = f"job {job} is left out: this version of Fusion does not take its record ({why}); submit it anew"
            self._carry_out([ev.RecordEvent(None, "job-left-out", words, {})])
        self.archive.sweep()
        self._background.copy_what_is_missing()
        self._ticking = self._background.spawn(self._tick(), "tick")
        control.receive()

    def offer_relay(self, relay: RelayProcess) -> None:
        """Workers that can't reach each other may meet there; it ends with us."""
        self._relay = relay
        self.lifecycle.relays.own_port = relay.port

    async def close(self) -> None:
        """Stop in order: no more ticks, slow work ends, what workers have already said is taken in, the store closes.

        Raises `ServiceError` when we had to end, or when not all could be recorded.
        """
        self.publisher.close()
        if self._ticking is not None:
            self._ticking.cancel()
            await asyncio.gather(self._ticking, return_exceptions=True)
        self._closing = True
        await self._catch_up(at_once=True)
        self._tell_who_waits()
        await self._background.settle()
        if self._relay is not None:
            await asyncio.to_thread(self._relay.close)
        if self._control is not None:
            await self._control.close()
        self._background.end()
        await self._background.settle()
        if await self._catch_up(at_once=True):
            self._save_what_waits()
        lost, waiting = self.store.behind, len(self._backlog)
        self.store.close()
        if self._failure is not None:
            raise ServiceError(self._failure)
        if lost is not None:
            raise ServiceError(
                f"can't write to {self.store.path}: {lost}; ended with {waiting} {plural('message', waiting)} of workers "
                "and what followed from earlier ones not on record"
            )

    async def _tick(self) -> None:
        failed = 0
        while not self.failing.is_set():
            await asyncio.sleep(TICK_SECONDS)
            try:
                if await self._catch_up():
                    self.post(ev.ClockTicked(self.clock()))
                    self._save_what_waits()
                    self.archive.collect()
                self.observations.beat(self.lifecycle.pool, self.publisher, self.clock())
                failed = 0
            except Exception as error:
                failed += 1
                if failed == 1:
                    logger.exception("a tick failed; others follow")
                if failed == _FAILING_TICKS:
                    said = " ".join(str(error).split())
                    self._fail(f"the coordinator can't go on: {type(error).__name__}: {said}; start it again")

    def _fail(self, why: str) -> None:
        self._failure = why
        self.failing.set()

    def _deaf(self, error: BaseException) -> None:
        logger.error("the control channel failed", exc_info=error)
        said = " ".join(str(error).split())
        self._fail(f"the coordinator can't hear its workers any more: {type(error).__name__}: {said}; start it again")

    # While nothing can be written ---------------------------------------------------------------------------------

    @property
    def _waits(self) -> bool:
        return self.store.behind is not None or len(self._backlog) > 0

    def must_record(self) -> None:
        """Raise `CantRecordError` while nothing can be recorded."""
        if self._waits:
            why = (
                f"can't write to {self.store.path}: {self.store.behind}"
                if self.store.behind
                else "what waited is written"
            )
            raise CantRecordError(f"{why}; nothing was done, ask again later")

    async def recorded(self) -> bool:
        """Wait until all that was asked for is on record; False when we end without that."""
        while self._waits and not self._closing:
            await self._news.wait()
        return not self._waits

    async def _catch_up(self, at_once: bool = False) -> bool:
        """Write what could not be written, if that is so and can be done; returns whether nothing waits any more.

        What has failed is tried again now and then only, unless `at_once`.
        """
        if not self._waits and self._behind_since is None:
            return True
        if self.store.behind is not None:
            self._notice_trouble()
            if not at_once and monotonic() < self._retry_at:
                return False
            self._retry_at = monotonic() + _RETRY_SECONDS
            if not self.store.catch_up():
                return False
            for incarnation, message in self._backlog.messages():
                self._send(incarnation, message)
        until = monotonic() + _TURN_SECONDS
        while (event := self._backlog.next()) is not None:
            try:
                self._carry_out(self.lifecycle.handle(event))
            except Exception:
                logger.exception("what follows from %s failed", type(event).__name__)
            if self.store.behind is not None:
                return False
            if monotonic() >= until:
                await asyncio.sleep(0)
                until = monotonic() + _TURN_SECONDS
        self._tell_of_recovery()
        self._tell_who_waits()
        return not self._waits

    def _notice_trouble(self) -> None:
        why = f"can't write to {self.store.path}: {self.store.behind}"
        if self.store.broken:
            self._fail(f"{why}; mend or move it, then start the coordinator again")
        elif self._behind_since is None and not self._closing:
            self._behind_since = monotonic()
            logger.error("%s; what happens is kept in memory until it can be written", why)

    def _tell_of_recovery(self) -> None:
        if self._behind_since is None:
            return
        seconds, self._behind_since = monotonic() - self._behind_since, None
        words = f"the coordinator's store can be written again after {format_seconds(seconds)}; nothing was lost"
        logger.warning("%s", words)
        self._record_event(ev.RecordEvent(None, "written-late", words, {"seconds": round(seconds, 3)}))
        self.store.commit()

    def _tell_who_waits(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _awaited(self, digest: str) -> bool:
        """Whether the blob is a part of a checkpoint that is being collected or written."""
        return any(
            ref.digest == digest
            for job in self.lifecycle.jobs.values()
            for parts in job.parts.values()
            for ref in parts.values()
        )

    # Events in ----------------------------------------------------------------------------------------------------

    def post(self, event: ev.Event) -> None:
        """Feed one event and carry out what follows from it, or keep it until something can be recorded again."""
        if self._waits:
            self._backlog.hold(event)
        else:
            self._carry_out(self.lifecycle.handle(event))

    def on_message(self, incarnation: str, message: ToCoordinator) -> None:
        """A message of the control channel."""
        if isinstance(message, CheckpointPart) and self.blobs.size(message.blob.digest) != message.blob.size:
            # Said again after a broken connection, say: its checkpoint is written and the part is gone.
            logger.info("job %s: a part of step %d was announced but is not here", message.job, message.step)
            return
        if isinstance(message, StepReport):
            self.observations.note(self.lifecycle.pool, incarnation, message, self.clock())
        self.post(ev.Reported(self.clock(), incarnation, message))

    def join(self, request: JoinRequest) -> Member:
        """Admit a worker; returns its record. Raises `NameTakenError`, `NameAskedForError` or `CantRecordError`."""
        self.must_record()
        now = self.clock()
        if (other := holder(self.lifecycle, request)) is not None:
            self.post(ev.NameClaimed(now, other.incarnation))
        member, former = admit(self.lifecycle, request, now), self.lifecycle.pool.get(request.name)
        self.control.admit(member.public_key, member.incarnation)
        self.post(ev.WorkerJoined(now, member))
        if former is not None:
            self.control.forget(former.incarnation)
        return member

    def greet(self, member: Member, seen_as: str) -> None:
        """Find out, beside other work, whether a worker that came from this address lets us in at its door."""
        self._background.greet(member, seen_as)

    def on_closed(self) -> None:
        """Connections of the control channel were closed."""
        self.post(ev.ConnectionClosed(self.clock()))

    async def submit(self, submission: Submission) -> Job:
        """Check and queue a job. Raises what `submission.accept` raises, or `CantRecordError`."""
        async with self._submitting:
            self.must_record()
            resume = self.archive.resume_point(submission.resume, self.lifecycle.jobs)
            number = self.store.highest_number() + 1
            job, dag = await asyncio.to_thread(
                accept,
                submission,
                resume,
                job_id=self._new_id(submission.spec.name, number),
                number=number,
                now=self.clock(),
                blobs=self.blobs,
                checkpoints=self.checkpoints,
                max_dag_bytes=self.config.max_dag_bytes,
                heartbeat_seconds=self.config.heartbeat_seconds,
                delay=self.lifecycle.links.longest_delay(self.lifecycle.pool.live()),
            )
            self.must_record()
            self._dags.keep(job, dag)
            digests = [job.dag.digest, job.weights.digest, job.data.blob.digest]
            if job.origin_optimizer is not None:
                digests.append(job.origin_optimizer.digest)
            self.store.pin(f"job/{job.id}", digests)
            self.post(ev.JobSubmitted(self.clock(), job))
            if not await self.recorded():
                raise CantRecordError(f"the coordinator ended before job {job.id} was on record; submit it again")
            return job

    def _new_id(self, name: str, number: int) -> str:
        return f"{name[:40]}-{number}"

    # Instructions out ---------------------------------------------------------------------------------------------

    def _carry_out(self, instructions: list[ev.Instruction]) -> None:
        """Write everything down first: what a worker is told must be known to a coordinator that starts again.

        Where that can't be done now, what workers are to be told waits.
        """
        saved: set[str] = set()
        for instruction in instructions:
            if isinstance(instruction, ev.SaveJob):
                self._save_job(instruction, saved)
            elif not isinstance(instruction, ev.Send):
                self._do(instruction)
        self.store.commit()
        for instruction in instructions:
            if isinstance(instruction, ev.Send):
                self._send(instruction.incarnation, instruction.message)

    def _save_job(self, asked: ev.SaveJob, saved: set[str]) -> None:
        """Write a job's record once for all instructions of one event; one that may wait is written at the next tick."""
        job = self.lifecycle.jobs[asked.job]
        if asked.soon and job.id not in saved:
            self._unsaved.add(job.id)
        elif job.id not in saved:
            saved.add(job.id)
            self._unsaved.discard(job.id)
            self.store.save_job(job)
            if job.terminal:
                self.archive.job_ended(job.id)
        if asked.announce:
            self.publisher.publish(Item("job", job.id, job_view(job)))

    def _save_what_waits(self) -> None:
        for job in self._unsaved:
            self.store.save_job(self.lifecycle.jobs[job])
        self._unsaved.clear()
        self.store.commit()

    def _do(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.MakePlan() | ev.PrepareWorkers() | ev.ProbeWorker() | ev.WriteCheckpoint():
                self._background.begin(instruction)
            case ev.ServeTickets(tickets):
                if self._relay is not None:
                    self._relay.allow(tickets)
            case ev.SavePlan(job_id, plan):
                self.store.save_plan(job_id, plan)
            case ev.SaveWorker(name):
                self._save_worker(name)
            case ev.DropBlobs(digests):
                self.archive.drop(digests)
            case ev.RecordMetric(job_id, metric):
                shown = self.store.add_metric(job_id, metric)
                self.observations.recorded(job_id, shown)
                self.publisher.publish(Item("metrics", job_id, {"job": job_id, **shown}))
            case ev.RecordEvent(job_id, event, message, fields):
                logger.info("%s", message, extra={"fields": {"event": event, "job": job_id, **fields}})
                self._record_event(instruction)
            case ev.RecordLog(job_id, worker, message):
                shown = self.store.add_log(self.clock(), job_id, worker, message)
                self.publisher.publish(Item("log", job_id, shown))

    def dag(self, job: Job) -> OpDag:
        """The job's OP-DAG. Blocks. Raises `FusionError` when its blob is gone or damaged."""
        return self._dags.of(job)

    @property
    def control(self) -> Control:
        assert self._control is not None, "start comes first"
        return self._control

    def _record_event(self, told: ev.RecordEvent) -> None:
        shown = self.store.add_event(self.clock(), told.job, told.event, told.message, told.fields)
        self.publisher.publish(Item("event", told.job, shown))

    def _send(self, incarnation: str, message: ToWorker) -> None:
        """Send, but not before what it may follow from is on record."""
        if self.store.behind is None:
            self.control.send(incarnation, message)
        else:
            self._backlog.hold_message(incarnation, message)

    def _save_worker(self, name: str) -> None:
        member = self.lifecycle.pool.get(name)
        assert member is not None
        self.store.save_worker(member)
        if not member.live:
            self.control.forget(member.incarnation)
        job = self.lifecycle.jobs.get(member.job) if member.job else None
        self.publisher.publish(Item("worker", None, worker_view(member, job)))
