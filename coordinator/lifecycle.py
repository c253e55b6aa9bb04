"""The coordinator's core as one state machine: pool membership and job life cycle; events in, instructions out.

No clock, socket, thread or file is used here: every event carries its time, and what must be done comes back as
instructions, in order. `coordinator.pool` draws the states of a worker, `coordinator.jobs` those of a job.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Literal

from coordinator import events as ev
from coordinator import progress, queueing
from coordinator.jobs import Job, Metric
from coordinator.membership import Membership, Timing
from coordinator.pool import Member
from fusion.messages import (
    CheckpointPart,
    EvaluationReport,
    Failure,
    Finished,
    Heartbeat,
    Leaving,
    PeerAddress,
    Ready,
    Start,
    StepReport,
    Warned,
)
from fusion.units import format_bytes, format_seconds


class Lifecycle(Membership):
    """The pool and all jobs. `handle` is the only way in; reading `pool` and `jobs` is free."""

    def __init__(self, timing: Timing | None = None) -> None:
        super().__init__(timing)
        self._warned: deque[tuple[str, Warned]] = deque(maxlen=200)

    # Entry points -------------------------------------------------------------------------------------------------

    def restore(self, jobs: Iterable[Job], members: Iterable[Member], now: float) -> list[ev.Instruction]:
        """Take up what an earlier process recorded; silence counts from now on, after a grace."""
        self.jobs = {job.id: job for job in jobs}
        for member in members:
            if member.live:
                member.last_heard = now + self.timing.restart_grace
            self.pool.put(member)
        for job in self.jobs.values():
            if job.state == "preparing":
                self._restart(job, now, "the coordinator was restarted while the job was being prepared")
            elif job.state == "running":
                self._story(
                    job, "coordinator-restarted", "coordinator restarted; the workers train on and report to it"
                )
            for step in job.writing:
                self._do(ev.WriteCheckpoint(job.id, step, job.parts.get(step, {}), job.spec.checkpoint.keep))
        self._schedule(now)
        return self._taken()

    def handle(self, event: ev.Event) -> list[ev.Instruction]:
        """Take in one event and return what must be done, in order."""
        match event:
            case ev.ClockTicked():
                self._tick(event.time)
            case ev.WorkerJoined():
                self._joined(event)
            case ev.Reported():
                self._reported(event)
            case ev.DrainRequested():
                member = self.pool.get(event.worker)
                if member is not None and member.live:
                    self._drain(member, event.time, "asked to leave")
            case ev.JobSubmitted():
                self.jobs[event.job.id] = event.job
                self._story(event.job, "submitted", f"job {event.job.spec.name} was submitted")
                self._do(ev.SaveJob(event.job.id))
            case ev.CancelRequested():
                job = self.jobs.get(event.job)
                if job is not None and not job.terminal:
                    self._end(job, event.time, "cancelled", f"cancelled on request at step {job.step}")
            case ev.PlanMade() | ev.PlanRefused():
                self._planned(event)
            case ev.PreparationFailed():
                job = self.jobs.get(event.job)
                if job is not None and job.state == "preparing" and job.epoch == event.epoch:
                    self._end(job, event.time, "failed", event.reason)
            case ev.CheckpointWritten() | ev.CheckpointFailed():
                self._checkpoint_over(event)
        self._schedule(event.time)
        return self._taken()

    # Messages of workers ------------------------------------------------------------------------------------------

    def _reported(self, event: ev.Reported) -> None:
        member = self.pool.of_incarnation(event.incarnation)
        if member is None or not member.live:
            if member is None or member.state == "lost":
                self._evict(event)
            return
        member.last_heard = max(member.last_heard, event.time)
        if member.state == "joined":
            member.state = "idle"
            self._do(ev.SaveWorker(member.name))
        message = event.message
        match message:
            case Heartbeat():
                member.memory_used_bytes = message.memory_used_bytes
            case Leaving():
                self._drain(member, event.time, message.reason)
            case Warned():
                if (event.incarnation, message) in self._warned:
                    return  # Said again after a broken connection.
                self._warned.append((event.incarnation, message))
                job = self.jobs.get(message.job) if message.job else None
                self._do(ev.RecordLog(job.id if job else None, member.name, message.message))
                self._story(job, "warning", f"worker {member.name}: {message.message}", worker=member.name)
            case _:
                job = self.jobs.get(message.job)
                if (
                    job is not None
                    and not job.terminal
                    and job.plan is not None
                    and message.epoch == job.epoch
                    and job.hosts.get(member.name) == member.incarnation
                ):
                    self._job_message(job, member, message, event.time)

    def _job_message(
        self,
        job: Job,
        member: Member,
        message: Ready | StepReport | EvaluationReport | CheckpointPart | Finished | Failure,
        now: float,
    ) -> None:
        match message:
            case Ready() if job.state == "preparing" and member.name not in job.ready:
                job.ready.append(member.name)
                self._do(ev.SaveJob(job.id, announce=False))
                if len(job.ready) == len(job.hosts):
                    self._start(job, now)
            case StepReport() if job.state == "running" and message.step <= job.train.steps:
                member.memory_used_bytes = message.memory_used_bytes or member.memory_used_bytes
                self._metrics(job, progress.add_step(job, member.name, message, now))
            case EvaluationReport() if job.state == "running":
                self._metrics(job, progress.add_evaluation(job, message))
            case CheckpointPart() if job.state == "running":
                self._part(job, member, message)
            case Finished() if job.state == "running" and member.name not in job.finished:
                job.finished.append(member.name)
                self._do(ev.SaveJob(job.id, announce=False))
                self._maybe_done(job, now)
            case Failure():
                if message.detail:
                    self._do(ev.RecordLog(job.id, member.name, message.detail))
                self._end(job, now, "failed", f"worker {member.name}: {message.message}")
            case _:
                pass  # Said too early, too late or twice: it changes nothing.

    def _start(self, job: Job, now: float) -> None:
        job.state, job.reason, job.last_completion = "running", "", now
        if job.started_at is None:
            job.started_at = now
        for incarnation in job.hosts.values():
            self._do(ev.Send(incarnation, Start(job=job.id, epoch=job.epoch)))
        count = len(job.hosts)
        self._story(
            job,
            "started",
            f"training starts {f'after step {job.restart_step} ' if job.restart_step else ''}on "
            f"{count} worker{'s' if count > 1 else ''} ({len(job.fragments)} fragments)",
            step=job.restart_step,
        )
        self._do(ev.SaveJob(job.id))

    def _metrics(self, job: Job, metrics: list[Metric]) -> None:
        for metric in metrics:
            self._do(ev.RecordMetric(job.id, metric))
            if metric.loss is not None and not math.isfinite(metric.loss):
                self._story(job, "loss-not-finite", f"loss is {metric.loss} at step {metric.step}", step=metric.step)
        self._do(ev.SaveJob(job.id, announce=False))

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _part(self, job: Job, member: Member, part: CheckpointPart) -> None:
        assert job.plan is not None
        late = job.checkpoint is not None and part.step <= job.checkpoint
        if late or part.step in job.writing or part.fragment not in job.plan.fragments_of(member.name):
            self._do(ev.DropBlobs((part.blob.digest,)))
            return
        parts = job.parts.setdefault(part.step, {})
        parts[part.fragment] = part.blob
        if len(parts) == len(job.plan.placement):
            job.writing.append(part.step)
            self._do(ev.WriteCheckpoint(job.id, part.step, dict(parts), job.spec.checkpoint.keep))
        self._do(ev.SaveJob(job.id, announce=False))

    def _checkpoint_over(self, event: ev.CheckpointWritten | ev.CheckpointFailed) -> None:
        job = self.jobs.get(event.job)
        if job is None:
            return
        if event.step in job.writing:
            job.writing.remove(event.step)
        # With a newer checkpoint there, half-collected older ones are of no use.
        written = isinstance(event, ev.CheckpointWritten)
        stale = [step for step in job.parts if written and step < event.step and step not in job.writing]
        self._do(ev.DropBlobs(tuple(ref.digest for step in stale for ref in job.parts[step].values())))
        job.parts = {step: parts for step, parts in job.parts.items() if step not in (*stale, event.step)}
        if isinstance(event, ev.CheckpointWritten):
            job.checkpoint = max(event.step, job.checkpoint or 0)
            self._story(
                job,
                "checkpoint",
                f"checkpoint at step {event.step} written ({format_bytes(event.size)})",
                step=event.step,
                bytes=event.size,
            )
        else:
            self._story(
                job,
                "checkpoint-failed",
                f"checkpoint at step {event.step} could not be written: {event.reason}; training goes on",
                step=event.step,
            )
        self._do(ev.SaveJob(job.id))
        if job.state == "running":
            self._maybe_done(job, event.time)
        if job.state == "running" and isinstance(event, ev.CheckpointWritten):
            for member in self.pool.of_job(job.id):
                if member.state == "draining":
                    self._move_off(member, event.time)
                    break

    # Job life cycle -----------------------------------------------------------------------------------------------

    def _schedule(self, now: float) -> None:
        """Start what can start, and say why the rest waits."""
        while True:
            queued = [job for job in self.jobs.values() if job.state == "queued"]
            if not queued:
                return
            decision = queueing.decide(queued, self.pool.live())
            for job_id, reason in decision.reasons.items():
                job = self.jobs[job_id]
                if job.reason != reason:
                    job.reason = reason
                    self._story(job, "queued", f"job {job.id} {reason}")
                    self._do(ev.SaveJob(job.id))
            if decision.start is None:
                return
            job, members = decision.start
            job.state, job.reason, job.planning = "preparing", "planning", True
            job.attempt += 1
            job.refused_for = None
            job.hosts = {member.name: member.incarnation for member in members}
            for member in members:
                member.state, member.job = "busy", job.id
                self._do(ev.SaveWorker(member.name))
            self._do(ev.MakePlan(job.id, job.attempt, tuple(job.hosts), job.plan))
            self._do(ev.SaveJob(job.id))

    def _planned(self, event: ev.PlanMade | ev.PlanRefused) -> None:
        job = self.jobs.get(event.job)
        if job is None or job.state != "preparing" or not job.planning or job.attempt != event.attempt:
            return
        job.planning = False
        if isinstance(event, ev.PlanRefused):
            if event.final:
                self._end(job, event.time, "failed", event.reason)
                return
            job.refused_for = sorted(job.hosts.values())
            self._release_unasked(job, keep=())
            self._forget_run(job)
            job.state, job.reason, job.refused_reason = "queued", event.reason, event.reason
            self._story(job, "queued", f"job {job.id} waits: {event.reason}")
            self._do(ev.SaveJob(job.id))
            return
        plan = event.plan.model_copy(update={"epoch": job.epoch})
        if job.plan is not None:
            # The same cuts and the same codecs: a restart must not change the bits.
            plan = plan.model_copy(update={"codecs": job.plan.codecs})
        job.plan, job.fragments = plan, list(event.fragments)
        self._release_unasked(job, keep=plan.workers)
        job.hosts = {name: job.hosts[name] for name in plan.workers}
        job.reason = "workers build their fragments"
        members = [member for member in self.pool.of_job(job.id) if member.name in job.hosts]
        peers = tuple(
            PeerAddress(worker=member.name, endpoint=member.endpoint, public_key=member.public_key)
            for member in members
        )
        self._do(ev.SavePlan(job.id, plan))
        self._do(ev.SaveJob(job.id))
        count = len(plan.workers)
        self._story(
            job,
            "planned",
            f"plan {plan.id}: {len(plan.placement)} fragments on {count} worker{'s' if count > 1 else ''} "
            f"({', '.join(plan.workers)})",
            plan=plan.id,
        )
        self._do(ev.PrepareWorkers(job.id, job.epoch, plan, peers, tuple(job.hosts.values()), job.checkpoint))

    def _restart(self, job: Job, now: float, cause: str) -> None:
        """Back to the last checkpoint, with the same cuts, on the workers that remain."""
        self._release(job, f"{cause}; the job starts again from step {job.restart_step}")
        lost_steps = max(0, job.step - job.restart_step)
        had_plan = job.plan is not None
        self._forget_run(job)
        job.state = "queued"
        job.refused_for = None
        if had_plan:
            job.epoch += 1
        job.reason = f"goes on from step {job.restart_step}: {cause}"
        source = "its checkpoint" if job.checkpoint is not None else "its start"
        self._story(
            job,
            "restarted",
            f"job {job.id} goes on from {source} at step {job.restart_step} because {cause}"
            + (f"; {lost_steps} step{'s' if lost_steps != 1 else ''} run again" if lost_steps else ""),
            step=job.restart_step,
        )
        self._do(ev.SaveJob(job.id))

    def _forget_run(self, job: Job) -> None:
        """Drop what belongs to the epoch that is over, half-collected checkpoints included."""
        stale = [ref.digest for step, parts in job.parts.items() if step not in job.writing for ref in parts.values()]
        if stale:
            self._do(ev.DropBlobs(tuple(stale)))
        job.forget_run()

    def _maybe_done(self, job: Job, now: float) -> None:
        if not self.all_finished(job) or job.writing:
            return
        self._metrics(job, progress.flush(job))
        if job.checkpoint != job.train.steps:
            self._story(job, "checkpoint-missing", f"no checkpoint of the last step {job.train.steps} could be kept")
        self._end(job, now, "done", "")

    def _end(self, job: Job, now: float, state: Literal["done", "failed", "cancelled"], reason: str) -> None:
        self._release(job, reason or "the job is done")
        job.state, job.reason, job.finished_at = state, reason, now
        self._forget_run(job)
        took = format_seconds(now - (job.started_at or job.submitted_at))
        story = {
            "done": f"job {job.id} is done: {job.step} steps in {took}",
            "failed": f"job {job.id} failed: {reason}",
            "cancelled": f"job {job.id} was {reason}",
        }[state]
        self._story(job, state, story, step=job.step)
        self._do(ev.SaveJob(job.id))
