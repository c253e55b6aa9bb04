"""A job's course: planned, prepared, started, sent back to its checkpoint, ended. Sans-I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from coordinator.life import events as ev
from coordinator.life import progress
from coordinator.life.backups import Backups
from coordinator.life.books import Books
from coordinator.life.jobs import Job, Metric
from coordinator.life.membership import all_finished
from coordinator.life.run import Run
from fusion.messages import Start, Stop
from fusion.units import format_seconds, plural


class Course:
    """Begins and ends runs of jobs."""

    def __init__(self, books: Books, backups: Backups) -> None:
        self._books = books
        self._backups = backups
        self._not_finite: set[str] = set()
        """Jobs whose last loss was no number."""

    def planned(self, job: Job, event: ev.PlanMade | ev.PlanRefused) -> None:
        """The scheduler has answered for a job that is being prepared."""
        job.planning = False
        if isinstance(event, ev.PlanRefused):
            self._refused(job, event)
            return
        plan = event.plan.model_copy(update={"epoch": job.epoch})
        if job.plan is not None and not job.recut:
            # The same cuts and the same codecs: a restart must not change the bits.
            plan = plan.model_copy(update={"codecs": job.plan.codecs})
        job.plan, job.fragments, job.recut = plan, list(event.fragments), False
        self._release_unasked(job, keep=plan.workers)
        job.hosts = {name: job.hosts[name] for name in plan.workers}
        job.reason = "workers build their fragments"
        job.run = Run(
            epoch=job.epoch,
            start=job.restart_step,
            from_origin=job.checkpoint is None,
            again_until=job.step,
            common_step=job.restart_step,
            settled=job.restart_step,
            since_epoch=job.epoch,
            highest=job.restart_step,
            prepared_at=event.time,
            prepare_patience=job.spec.fault_tolerance.failure_timeout,
        )
        self._books.do(ev.SavePlan(job.id, plan))
        pieces, count = len(plan.placement), len(plan.workers)
        self._books.story(
            job,
            "planned",
            f"plan {plan.id}: {pieces} {plural('fragment', pieces)} on {count} {plural('worker', count)} "
            f"({', '.join(plan.workers)})",
            plan=plan.id,
        )
        self._backups.assign(job, plan)
        self._books.save(job)
        self._prepare(job, job.hosts)

    def prepare_again(self, job: Job, now: float) -> None:
        """Tell hosts that are not ready yet again, now and then: a connection that broke may have lost it."""
        run = job.run
        if job.state != "preparing" or job.planning or run is None or now - run.prepared_at < run.prepare_patience:
            return
        run.prepared_at = now
        run.prepare_patience *= 2
        self._prepare(job, [name for name in job.hosts if name not in job.ready])

    def _prepare(self, job: Job, workers: Iterable[str]) -> None:
        assert job.plan is not None
        assert job.run is not None
        peers, hosts = tuple(self._books.addresses(job)), tuple(job.hosts[name] for name in workers)
        # Not the newest one, which may have been written since: all begin with the same.
        checkpoint, backups = None if job.run.from_origin else job.run.start, dict(job.run.backups)
        self._books.do(ev.PrepareWorkers(job.id, job.epoch, job.plan, peers, hosts, checkpoint, backups))

    def _refused(self, job: Job, event: ev.PlanRefused) -> None:
        if event.final:
            self.end(job, event.time, "failed", event.reason)
            return
        job.refused_for = sorted(job.hosts.values())
        self._release_unasked(job, keep=())
        self._forget_run(job)
        if job.recut:
            job.recut, job.refused_for = False, None  # Then with the cuts that it had.
        job.state, job.reason, job.refused_reason = "queued", event.reason, event.reason
        self._books.story(job, "queued", f"job {job.id} waits: {event.reason}")
        self._books.save(job)

    def ready(self, job: Job, worker: str, now: float) -> None:
        """A worker has built its fragments."""
        if worker in job.ready:
            return
        job.ready.append(worker)
        self._books.save(job, announce=False)
        if len(job.ready) == len(job.hosts):
            self._start(job, now)

    def _start(self, job: Job, now: float) -> None:
        job.state, job.reason, job.last_completion = "running", "", now
        if job.started_at is None:
            job.started_at = now
        self._books.tell(job, Start(job=job.id, epoch=job.epoch))
        count, pieces = len(job.hosts), len(job.fragments)
        self._books.story(
            job,
            "started",
            f"training starts {f'after step {job.restart_step} ' if job.restart_step else ''}on "
            f"{count} {plural('worker', count)} ({pieces} {plural('fragment', pieces)})",
            step=job.restart_step,
        )
        self._books.save(job)

    def restart(self, job: Job, now: float, cause: str) -> None:
        """Back to the last checkpoint, with the same cuts, on the workers that remain."""
        self._release(job, f"{cause}; the job starts again from step {job.restart_step}")
        lost_steps = max(0, job.step - job.restart_step)
        if job.state == "running":
            job.restarts += 1
        if job.plan is not None:
            job.epoch += 1
        self.publish(job, progress.flush(job, job.restart_step))  # Those steps are not run again.
        self._forget_run(job)
        job.state = "queued"
        job.refused_for = None
        job.reason = f"goes on from step {job.restart_step}: {cause}"
        source = "its checkpoint" if job.checkpoint is not None else "its start"
        self._books.story(
            job,
            "restarted",
            f"job {job.id} goes on from {source} at step {job.restart_step} because {cause}"
            + (f"; {lost_steps} {plural('step', lost_steps)} run again" if lost_steps else ""),
            step=job.restart_step,
        )
        self._books.save(job)

    def end_when_done(self, job: Job, now: float) -> None:
        """The job is done once everybody is finished, nothing is said to be missing, and no checkpoint is being written."""
        if not all_finished(job) or job.writing or progress.unsettled(job, job.train.steps):
            return
        if not progress.all_said(job, now):
            self._books.save(job, announce=False, soon=True)
            return
        self.publish(job, progress.flush(job))
        if job.whole(job.train.steps):
            return  # It waited for reports that were just given up.
        if job.checkpoint != job.train.steps:
            self._books.story(
                job, "checkpoint-missing", f"no checkpoint of the last step {job.train.steps} could be kept"
            )
        self.end(job, now, "done", "")

    def publish_settled(self, job: Job, now: float) -> None:
        """Give out what has waited for its spot checks, or for reports that will not come any more."""
        if metrics := progress.settled(job, now):
            self.publish(job, metrics)

    def publish(self, job: Job, metrics: list[Metric]) -> None:
        """Give out the metrics of steps that are complete."""
        for metric in metrics:
            self._books.do(ev.RecordMetric(job.id, metric))
            if metric.loss is not None:
                self._notice(job, metric.step, metric.loss)
        self._books.save(job, announce=False, soon=not metrics)

    def _notice(self, job: Job, step: int, loss: float) -> None:
        """Tell once when the loss is no number any more, and once when it is one again: it may stay so for long."""
        if math.isfinite(loss) != (job.id in self._not_finite):
            return
        if math.isfinite(loss):
            self._not_finite.discard(job.id)
            self._books.story(job, "loss-finite", f"loss is {loss:.5g} again at step {step}", step=step)
        else:
            self._not_finite.add(job.id)
            advice = (
                "look at the data, the model's first weights and the loss"
                if step == 1
                else "a smaller train.optimizer.lr or train.clip_grad_norm may help, if the data is right"
            )
            self._books.story(job, "loss-not-finite", f"loss is {loss} from step {step} on; {advice}", step=step)

    def end(self, job: Job, now: float, state: Literal["done", "failed", "cancelled"], reason: str) -> None:
        """The job is over, and its workers are free."""
        self._release(job, reason or "the job is done")
        job.state, job.reason, job.finished_at = state, reason, now
        self._not_finite.discard(job.id)
        self._forget_run(job)
        took = format_seconds(now - (job.started_at or job.submitted_at))
        story = {
            "done": f"job {job.id} is done: {job.step} {plural('step', job.step)} in {took}",
            "failed": f"job {job.id} failed: {reason}",
            "cancelled": f"job {job.id} was {reason}",
        }[state]
        self._books.story(job, state, story, step=job.step)
        self._books.save(job)

    # Workers of a job ---------------------------------------------------------------------------------------------

    def _release(self, job: Job, reason: str) -> None:
        """Free all workers of a job, and tell them to forget it."""
        for member in self._books.pool.of_job(job.id):
            self._books.do(ev.Send(member.incarnation, Stop(job=job.id, reason=reason)))
            self._books.free(member)

    def _release_unasked(self, job: Job, keep: Iterable[str]) -> None:
        """Free the workers that were taken for a plan but have not heard of the job yet."""
        kept = set(keep)
        for member in self._books.pool.of_job(job.id):
            if member.name not in kept:
                self._books.free(member)

    def _forget_run(self, job: Job) -> None:
        """Drop what belongs to the run that is over, half-collected checkpoints included."""
        stale = [ref.digest for step, parts in job.parts.items() if step not in job.writing for ref in parts.values()]
        if stale:
            self._books.do(ev.DropBlobs(tuple(stale)))
        job.forget_run()
