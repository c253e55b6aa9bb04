"""The coordinator's core as one state machine: pool membership and job life cycle; events in, instructions out.

No clock, socket, thread or file is used here: every event carries its time, and what must be done comes back as
instructions, in order. `coordinator.life.pool` draws the states of a worker, `coordinator.life.jobs` those of a job. This class says
whom an event concerns; the rules are in `membership` (workers), `course` (jobs), `recovery` (losses) and `collecting`
(checkpoints).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import SystemRandom

from coordinator.life import claims, progress, queueing, set_back, slowness
from coordinator.life import events as ev
from coordinator.life.books import Books, Timing
from coordinator.life.collecting import Collecting
from coordinator.life.course import Course
from coordinator.life.doors import Doors
from coordinator.life.jobs import Job
from coordinator.life.link_watch import LinkWatch
from coordinator.life.links import Links
from coordinator.life.membership import Membership
from coordinator.life.pool import Member, Pool
from coordinator.life.recovery import Recovery, RecoveryMessage
from coordinator.life.relays import Relays
from coordinator.life.spot_checks import SpotChecks
from coordinator.life.words import Words
from fusion.messages import (
    Arrivals,
    CheckpointPart,
    Connected,
    EvaluationReport,
    Failure,
    Finished,
    Heartbeat,
    JobMessage,
    Leaving,
    LinkMeasured,
    PeerLost,
    Reached,
    Ready,
    Start,
    StepReport,
    Stop,
    Unreached,
    Warned,
)


class Lifecycle:
    """The pool and all jobs. `handle` is the only way in; reading `pool` and `jobs` is free."""

    def __init__(
        self,
        timing: Timing | None = None,
        links: Links | None = None,
        draw: Callable[[], float] | None = None,
    ) -> None:
        self.links = links or Links()
        self._books = Books(timing, self.links)
        self._recovery = Recovery(
            self._books, self.go_back, SpotChecks(self._books, draw or SystemRandom().random, self._distrust)
        )
        self._course = Course(self._books, self._recovery.backups)
        self._collecting = Collecting(self._books)
        self._link_watch = LinkWatch(self._books)
        self._membership = Membership(self._books, self)
        self._doors = Doors(self._books)
        self.words = Words()

    @property
    def pool(self) -> Pool:
        return self._books.pool

    @property
    def relays(self) -> Relays:
        return self._books.relays

    @property
    def jobs(self) -> dict[str, Job]:
        return self._books.jobs

    def failure_timeout(self, member: Member) -> float:
        """Seconds of silence after which `member` counts as lost."""
        return self._membership.failure_timeout(member)

    def lives(self, member: Member, now: float) -> bool:
        """Whether `member` has been heard within a few heartbeats."""
        return self._doors.lives(member, now)

    # Entry points -------------------------------------------------------------------------------------------------

    def restore(self, jobs: Iterable[Job], members: Iterable[Member], now: float) -> list[ev.Instruction]:
        """Take up what an earlier process recorded; silence counts from now on, after a grace."""
        self.jobs.update({job.id: job for job in jobs})
        for member in members:
            if member.live:
                set_back.of_member(member, now, self._books.timing.drain_patience)
                member.excused_until = now + self._books.timing.restart_grace
            self.pool.put(member)
        for job in self.jobs.values():
            if not job.terminal:
                set_back.of_job(job, now)
            if job.state == "preparing":
                self._course.restart(job, now, "the coordinator was restarted while the job was being prepared")
            elif job.state == "running":
                self._books.story(
                    job, "coordinator-restarted", "coordinator restarted; the workers train on and report to it"
                )
                self._recovery.restore(job, now)
            for step in job.writing:
                self._books.do(ev.WriteCheckpoint(job.id, step, job.parts.get(step, {}), job.spec.checkpoint.keep))
        self._schedule()
        return self._books.taken()

    def handle(self, event: ev.Event) -> list[ev.Instruction]:
        """Take in one event and return what must be done, in order."""
        match event:
            case ev.ClockTicked():
                self._membership.tick(event.time)
                self._recovery.notice_idle(event.time)
                self._recovery.knock(event.time)
                self._doors.tick(event.time)
                self._link_watch.tick(event.time)
                for job in self.jobs.values():
                    self._course.prepare_again(job, event.time)
                    if job.state == "running":
                        self._course.publish_settled(job, event.time)
                    self._advance(job, event.time)
            case ev.WorkerJoined():
                live = self.pool.live()
                self.links.forget(event.member.name)
                self.links.keep(frozenset(member.name for member in live))
                self.words.forget(frozenset(member.incarnation for member in live))
                self._membership.joined(event)
            case ev.WorkerUnreachable():
                member = self.pool.of_incarnation(event.incarnation)
                if member is not None and member.live and not self._doors.refuted(member, event):
                    self._membership.lose([(member, "connection closed")], event.time)
            case ev.WorkerGreeted():
                member = self.pool.of_incarnation(event.incarnation)
                if member is not None and member.live:
                    member.greeted = True
                    self._books.do(ev.SaveWorker(member.name))
            case ev.ConnectionClosed():
                self._doors.connection_closed(event.time)
            case ev.NameClaimed():
                member = self.pool.of_incarnation(event.incarnation)
                if member is not None and member.live:
                    self._doors.claimed(member, event.time)
            case ev.Reported():
                self._reported(event)
            case ev.DrainRequested():
                member = self.pool.get(event.worker)
                if member is not None and member.live:
                    self._drain(member, event.time, "asked to leave")
            case ev.JobSubmitted():
                self.jobs[event.job.id] = event.job
                self._books.story(event.job, "submitted", f"job {event.job.spec.name} was submitted")
                self._books.save(event.job)
            case ev.CancelRequested():
                if (asked := self.jobs.get(event.job)) is not None and not asked.terminal:
                    self._course.end(asked, event.time, "cancelled", f"cancelled on request at step {asked.step}")
            case ev.PlanMade() | ev.PlanRefused():
                self._planned(event)
            case ev.PreparationFailed():
                self._preparation_failed(event)
            case ev.CheckpointWritten() | ev.CheckpointFailed():
                self._checkpoint_over(event)
            case ev.CheckpointCopied():
                if (found := self.jobs.get(event.job)) is not None:
                    self._collecting.copied(found, event)
        self._schedule()
        return self._books.taken()

    # What becomes of a job when its workers go (`membership.Consequences`) -----------------------------------------

    def lost(self, job: Job, members: Sequence[Member], now: float) -> None:
        self._recovery.lost(job, members, now)

    def move_off(self, job: Job, member: Member) -> bool:
        return self._recovery.moves.possible(job)

    def moving_takes(self, job: Job) -> float:
        return self._recovery.moves.takes(job)

    def hand_over(self, job: Job, member: Member, now: float) -> bool:
        return self._recovery.hand_over(job, member, now)

    def go_back(self, job: Job, now: float, cause: str) -> None:
        self._course.restart(job, now, cause)

    def _distrust(self, job: Job, liar: Member | None, now: float, why: str) -> None:
        """A spot check has failed: the job goes on from before what was checked, without the liar if one is known."""
        if liar is not None:
            self._membership.expel(liar, job, why.removeprefix(f"worker {liar.name} "))
        self._course.restart(job, now, why)

    # Messages of workers ------------------------------------------------------------------------------------------

    def _reported(self, event: ev.Reported) -> None:
        member = self.pool.of_incarnation(event.incarnation)
        if member is None or not member.live:
            self._membership.evict(event)
            return
        member.last_heard = max(member.last_heard, event.time)
        if member.state == "joined":
            member.state = "idle"
            self._books.do(ev.SaveWorker(member.name))
        message = event.message
        match message:
            case Heartbeat():
                member.memory_used_bytes, member.refused = message.memory_used_bytes, message.refused
                if member.job is None:
                    member.own_bytes = message.memory_used_bytes
            case Leaving():
                self._drain(member, event.time, message.reason)
            case Warned():
                if (text := self.words.take(event.time, event.incarnation, message)) is not None:
                    job = self.jobs.get(message.job) if message.job else None
                    self._books.story(job, "warning", f"worker {member.name}: {text}", worker=member.name)
            case LinkMeasured() | Arrivals() | Unreached() | Reached():
                self._link_watch.heard(member, message, event.time)
            case PeerLost() | Connected():
                job = self._job_of(message.job, member)
                if job is not None:
                    if isinstance(message, PeerLost):
                        self._recovery.suspect(job, message, event.time)
                    else:
                        self._recovery.moves.connected(job, member, message)
                        self._advance(job, event.time)
            case _:
                job = self._job_of(message.job, member)
                # A placement may change while a message is on its way: any epoch of the current run counts.
                if job is not None and (job.run.epoch if job.run else job.epoch) <= message.epoch <= job.epoch:
                    self._job_message(job, member, message, event.time)
                    self._advance(job, event.time)
                elif isinstance(message, CheckpointPart):
                    self._collecting.let_go(message)
                elif job is None and isinstance(message, Ready | StepReport):
                    # The job is over, or goes on without it; a connection that broke may have lost that.
                    stop = Stop(job=message.job, reason="this worker has no part in the job any more")
                    self._books.do(ev.Send(member.incarnation, stop))
                    if isinstance(message, Ready) and (given_up := self.jobs.get(message.job)) is not None:
                        self._recovery.moves.ready_late(given_up, member)

    def _advance(self, job: Job, now: float) -> None:
        """Take the next step of whatever is under way, and give out what is past its spot checks."""
        self._recovery.advance(job, now)
        if job.state != "running":
            return
        ending = job.finished or job.spec.verify.fraction
        if ending:
            self._course.publish_settled(job, now)
        if job.parts:
            self._collecting.write_whole(job)
        if ending:
            self._course.end_when_done(job, now)

    def _job_of(self, name: str, member: Member) -> Job | None:
        """The job, if this worker takes part in it."""
        job = self.jobs.get(name)
        if job is None or job.terminal or job.plan is None or job.hosts.get(member.name) != member.incarnation:
            return None
        return job

    def _job_message(self, job: Job, member: Member, message: JobMessage, now: float) -> None:
        match message:
            case Ready() if job.state == "preparing":
                self._course.ready(job, member.name, now)
            case Ready() if self._recovery.moves.is_newcomer(job, member):
                self._recovery.moves.ready(job, member, message)
            case Ready():
                # It waits to be started, so it has not heard that the others were.
                self._books.tell(job, Start(job=job.id, epoch=message.epoch), (member.name,))
            case StepReport() if job.state == "running" and message.step <= job.train.steps:
                member.memory_used_bytes = message.memory_used_bytes or member.memory_used_bytes
                early = [slowness.note(job, member.name, times) for times in message.fragments]
                if any(early):
                    claims.check(self._books, job)
                self._course.publish(job, progress.add_step(job, member.name, message, now))
            case EvaluationReport() if job.state == "running" and progress.evaluation_due(job, message.step):
                self._course.publish(job, progress.add_evaluation(job, message, now))
            case CheckpointPart() if job.state == "running":
                self._collecting.part(job, message)
            case CheckpointPart():
                self._collecting.let_go(message)
            case Finished() if job.state == "running" and message.epoch == job.epoch:
                if member.name not in job.finished:
                    job.finished.append(member.name)
                    self._books.save(job, announce=False)
                    self._course.end_when_done(job, now)
            case Failure():
                self._failed(job, member, message, now)
            case _ if job.state == "running" and isinstance(message, RecoveryMessage):
                self._recovery.heard(job, member, message, now)
            case _:
                pass  # Said too early, too late or twice: it changes nothing.

    def _failed(self, job: Job, member: Member, message: Failure, now: float) -> None:
        if message.detail:
            self._books.do(ev.RecordLog(job.id, member.name, message.detail))
        if self._recovery.moves.is_newcomer(job, member):
            why = f"worker {member.name}: {message.message}"
            self._recovery.give_up_move(job, now, why, blamed=[member.name])
        else:
            self._course.end(job, now, "failed", f"worker {member.name}: {message.message}")

    def _drain(self, member: Member, now: float, why: str) -> None:
        job = self._books.job_of(member)
        self._membership.drain(member, now, why)
        if job is not None and job.state == "running":
            if self._recovery.moves.is_newcomer(job, member):
                self._recovery.give_up_move(job, now, f"worker {member.name} leaves")
            self._advance(job, now)

    # Plans --------------------------------------------------------------------------------------------------------

    def _schedule(self) -> None:
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
                    self._books.story(job, "queued", f"job {job.id} {reason}")
                    self._books.save(job)
            if decision.start is None:
                return
            job, members = decision.start
            job.state, job.reason, job.planning = "preparing", "planning", True
            job.attempt += 1
            job.refused_for = None
            job.hosts = {member.name: member.incarnation for member in members}
            for member in members:
                member.state, member.job = "busy", job.id
                self._books.do(ev.SaveWorker(member.name))
            slower = {member.name: member.slower for member in members}
            previous = None if job.recut else job.plan
            self._books.do(ev.MakePlan(job.id, job.attempt, tuple(job.hosts), previous, slower))
            self._books.save(job)

    def _planned(self, event: ev.PlanMade | ev.PlanRefused) -> None:
        job = self.jobs.get(event.job)
        if job is None or job.attempt != event.attempt:
            return
        if job.state == "preparing" and job.planning:
            self._course.planned(job, event)
        elif job.state == "running" and job.run is not None and job.run.asked_for_move == event.attempt:
            self._recovery.moves.planned(job, event)
            self._advance(job, event.time)

    # Slow work ----------------------------------------------------------------------------------------------------

    def _preparation_failed(self, event: ev.PreparationFailed) -> None:
        job = self.jobs.get(event.job)
        if job is None or job.epoch != event.epoch:
            return
        if job.state == "preparing":
            self._course.end(job, event.time, "failed", event.reason)
        elif job.state == "running":
            newcomers = job.run.move.newcomers if job.run is not None and job.run.move is not None else ()
            self._recovery.moves.abandon(job, event.time, event.reason, blamed=newcomers, pause=True)

    def _checkpoint_over(self, event: ev.CheckpointWritten | ev.CheckpointFailed) -> None:
        job = self.jobs.get(event.job)
        if job is None:
            return
        self._collecting.over(job, event)
        self._course.end_when_done(job, event.time)
        last = event.step == job.train.steps  # Only the end of the job is left to wait for.
        if job.state == "running" and isinstance(event, ev.CheckpointWritten) and not last:
            self._membership.leave_at_checkpoint(job, event.time)
            self._recut(job, event.time)

    def _recut(self, job: Job, now: float) -> None:
        """Cut a job anew if that was found to pay, nothing else is under way, and nobody waits for workers."""
        run = job.run
        if job.state != "running" or run is None or not run.recut or run.switch is not None or run.move is not None:
            return
        if not any(other.state == "queued" for other in self.jobs.values()):
            job.recut = True
            self.go_back(job, now, run.recut)
