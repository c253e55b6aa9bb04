"""What takes longer than an event may: plans, preparations, probes and checkpoints, in tasks beside the events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from weakref import WeakValueDictionary

from coordinator import probing
from coordinator.archive import Archive
from coordinator.entry import knock
from coordinator.life import events as ev
from coordinator.life.jobs import Job
from coordinator.life.lifecycle import Lifecycle
from coordinator.life.pool import Member
from coordinator.plans.candidates import candidates
from coordinator.plans.planning import Planner, anew, answer
from coordinator.storage.checkpoints import Checkpoint, Checkpoints
from coordinator.storage.copies import Copies
from dag.graph import OpDag
from fusion.errors import BlobError, FusionError
from fusion.messages import Prepare, Resume, ToWorker

logger = logging.getLogger(__name__)

_KNOCKS = 32
"""At a time, where nobody waits for the answer: a network that breaks makes a whole pool silent."""

Slow = ev.MakePlan | ev.PrepareWorkers | ev.ProbeWorker | ev.WriteCheckpoint


class Background:
    """Runs on the event loop's thread; what blocks (`dag`, a job's OP-DAG, among it) is left to others.

    `post` takes the event that comes of it, `send` a message to a worker's incarnation. `recorded` waits until all that was
    posted is on record, and says whether it is.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        planner: Planner,
        archive: Archive,
        checkpoints: Checkpoints,
        dag: Callable[[Job], OpDag],
        clock: Callable[[], float],
        post: Callable[[ev.Event], None],
        send: Callable[[str, ToWorker], None],
        recorded: Callable[[], Awaitable[bool]],
        copies: Copies | None = None,
    ) -> None:
        self._lifecycle = lifecycle
        self._planner = planner
        self._archive = archive
        self._checkpoints = checkpoints
        self._dag = dag
        self._clock = clock
        self._post = post
        self._send = send
        self._recorded = recorded
        self._copies = copies
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = False
        # Checkpoints of one job are written one after the other, so that pruning sees them in order.
        self._writing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._copying = asyncio.Lock()
        self._outdated: dict[str, list[int]] = {}
        """By job, the steps of copies that no longer belong to a checkpoint here."""
        self._knocking = asyncio.Semaphore(_KNOCKS)
        self._in_turn: set[str] = set()
        """Incarnations at whose doors we knock, or are about to, for their silence."""

    def begin(self, asked: Slow) -> None:
        """Do what is asked."""
        match asked:
            case ev.MakePlan():
                self.spawn(self._make_plan(asked), f"plan {asked.job}")
            case ev.PrepareWorkers():
                self.spawn(self._prepare(asked), f"prepare {asked.job}")
            case ev.ProbeWorker(unless_heard_after=None):
                self.spawn(self._probe(asked), f"probe {asked.worker}")
            case ev.ProbeWorker() if asked.incarnation not in self._in_turn:
                self._in_turn.add(asked.incarnation)
                self.spawn(self._probe_in_turn(asked), f"probe {asked.worker}")
            case ev.WriteCheckpoint():
                self.spawn(self._write_checkpoint(asked), f"checkpoint {asked.job}@{asked.step}")

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """A task that is waited for at the end; an error that ends it is logged."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def settle(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def end(self) -> None:
        """The store is about to close: what comes of anything now is dropped, the next start asks for it again."""
        self._over = True

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)

    async def _make_plan(self, asked: ev.MakePlan) -> None:
        job = self._lifecycle.jobs[asked.job]
        event: ev.Event
        try:
            found = await candidates(self._lifecycle, asked)
            plan, fragments, current = await asyncio.to_thread(answer, self._planner, self._dag, job, found, asked)
            fresh = await asyncio.to_thread(anew, self._planner, self._dag, job, found) if asked.recut else None
        except FusionError as error:
            event = ev.PlanRefused(self._clock(), asked.job, asked.attempt, str(error))
        except Exception as error:
            logger.exception("planning job %s failed", asked.job)
            event = ev.PlanRefused(
                self._clock(), asked.job, asked.attempt, f"the scheduler failed: {type(error).__name__}: {error}", True
            )
        else:
            event = ev.PlanMade(self._clock(), asked.job, asked.attempt, plan, fragments, current, fresh)
        self._post_late(event)

    async def _prepare(self, asked: ev.PrepareWorkers) -> None:
        job = self._lifecycle.jobs[asked.job]
        weights, resume = job.weights, None
        if job.origin_step:
            resume = Resume(step=job.origin_step, optimizer=job.origin_optimizer)
        if asked.checkpoint is not None:
            found = self._archive.find(job.id, asked.checkpoint)
            try:
                if found is None:
                    raise BlobError(f"checkpoint {job.id}@{asked.checkpoint} is not recorded")
                weights = await asyncio.to_thread(lambda: self._archive.weights_after(job, self._dag(job), found))
            except Exception as error:
                reason = f"can't go on from step {asked.checkpoint}: {self._reason(error)}"
                self._post_late(ev.PreparationFailed(self._clock(), job.id, asked.epoch, reason))
                return
            resume = Resume(step=found.step, optimizer=found.optimizer)
        if job.state != ("running" if asked.joining else "preparing") or job.epoch != asked.epoch or self._over:
            return
        message = Prepare(
            job=job.id,
            plan=asked.plan,
            dag=job.dag,
            weights=weights,
            data=job.data,
            train=job.train,
            peers=list(asked.peers),
            resume=resume,
            failure_timeout=job.spec.fault_tolerance.failure_timeout,
            backups=asked.backups,
            log_bytes=job.spec.fault_tolerance.log_memory,
            verify=bool(job.spec.verify.fraction),
        )
        for incarnation in asked.hosts:
            self._send(incarnation, message)

    def greet(self, member: Member, seen_as: str) -> None:
        """Find out whether a worker that has joined from this address lets us in."""
        self.spawn(self._greet(member, seen_as), f"greet {member.name}")

    async def _greet(self, member: Member, seen_as: str) -> None:
        async with self._knocking:
            greeted = knock.is_own(member.endpoint, seen_as) and await probing.greets(member.endpoint)
        if greeted:
            self._post_late(ev.WorkerGreeted(self._clock(), member.incarnation))

    async def _probe(self, asked: ev.ProbeWorker) -> None:
        if await probing.refuses(asked.endpoint):
            self._post_late(ev.WorkerUnreachable(self._clock(), asked.incarnation, asked.unless_heard_after))

    async def _probe_in_turn(self, asked: ev.ProbeWorker) -> None:
        try:
            async with self._knocking:
                await self._probe(asked)
        finally:
            self._in_turn.discard(asked.incarnation)

    def _reason(self, error: Exception) -> str:
        """The reason in words; what nobody foresaw goes to the log with its traceback."""
        if isinstance(error, FusionError | OSError):
            return str(error)
        logger.error("unexpected failure", exc_info=error)
        return f"{type(error).__name__}: {error}"

    async def _write_checkpoint(self, asked: ev.WriteCheckpoint) -> None:
        job = self._lifecycle.jobs[asked.job]
        in_turn = self._writing.setdefault(job.id, asyncio.Lock())
        async with in_turn:
            event: ev.Event
            old: list[int] = []
            try:
                written = await asyncio.to_thread(
                    lambda: self._checkpoints.consolidate(job.id, asked.step, self._dag(job), job.weights, asked.parts)
                )
            except Exception as error:
                event = ev.CheckpointFailed(self._clock(), job.id, asked.step, self._reason(error))
            else:
                event = ev.CheckpointWritten(self._clock(), job.id, asked.step, written.size)
            if not await self._recorded() or self._over:
                return  # The parts stay, the job's record says that it is being written: the next start does it again.
            if isinstance(event, ev.CheckpointWritten):
                run = job.run
                needed = None if run is None or run.from_origin else run.start
                old = self._archive.record(written, self._clock(), asked.keep, needed)
            self._post(event)
            if not await self._recorded():
                return
            # Only now is it committed that the new checkpoint is there and the old ones are not.
            for step in old:
                self._archive.remove(job.id, step)
            self._archive.drop(ref.digest for ref in asked.parts.values())
        if self._copies is not None and isinstance(event, ev.CheckpointWritten):
            self.spawn(self._copy(self._copies, written, old), f"copy {asked.job}@{asked.step}")

    def copy_what_is_missing(self) -> None:
        """Copy each job's newest checkpoint, if an earlier process could not."""
        if self._copies is not None:
            newest = [(job.id, job.checkpoint) for job in self._lifecycle.jobs.values() if job.checkpoint is not None]
            self.spawn(self._catch_up(self._copies, newest), "copies")

    async def _catch_up(self, copies: Copies, newest: list[tuple[str, int]]) -> None:
        for job, step in newest:
            found = self._archive.find(job, step)
            try:
                if found is None or await asyncio.to_thread(copies.has, job, step):
                    continue
            except FusionError as error:
                logger.warning("%s", error)
                return
            await self._copy(copies, found, [])

    async def _copy(self, copies: Copies, found: Checkpoint, old: list[int]) -> None:
        """One after the other: they share one way out. What is `old` goes when a newer one is there."""
        self._outdated.setdefault(found.job, []).extend(old)
        async with self._copying:
            if self._over or self._archive.find(found.job, found.step) is None:
                return  # A newer one has taken its place while it waited.
            reason: str | None = None
            try:
                await asyncio.to_thread(copies.write, found)
            except Exception as error:
                reason = self._reason(error)
                if self._archive.find(found.job, found.step) is None:
                    return
            else:
                await self._remove_outdated(copies, found)
            where = copies.where(found.job, found.step)
            self._post_late(ev.CheckpointCopied(self._clock(), found.job, found.step, where, reason))

    async def _remove_outdated(self, copies: Copies, found: Checkpoint) -> None:
        outdated = self._outdated[found.job]  # Others that wait may add to it.
        try:
            for step in [step for step in outdated if step < found.step]:
                await asyncio.to_thread(copies.remove, found.job, step)
                outdated.remove(step)
        except FusionError as error:
            logger.warning("%s", error)

    def _post_late(self, event: ev.Event) -> None:
        if not self._over:
            self._post(event)
