"""Who takes the fragments of lost workers over, and how everybody comes to follow the new placement.

Cuts and codecs stay, and nobody else goes back: a fragment goes on after the common step on the worker that holds its
snapshot. Where there is none, the job goes back to its last checkpoint.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from coordinator.life import events as ev
from coordinator.life.backups import Backups
from coordinator.life.books import Books
from coordinator.life.jobs import Job
from coordinator.life.pool import Member
from coordinator.life.run import Run, Switch
from fusion.messages import Adopt, Adopted, CaughtUp
from fusion.plan import Plan
from fusion.units import format_seconds, plural


def heirs(job: Job, live: Sequence[Member]) -> tuple[str, ...] | str:
    """The placement after the loss of whoever is not `live`; or why the job must go back to a checkpoint, in words."""
    assert job.plan is not None
    assert job.run is not None
    if not live:
        return "no worker of the job is left"
    names = {member.name for member in live}
    placement = list(job.plan.placement)
    load = Counter(host for host in placement if host in names)
    for fragment, host in enumerate(placement):
        if host in names:
            continue
        heir = job.run.holders.get(fragment)
        if heir not in names and _in_blobs(job.run):
            heir = job.run.backups.get(fragment)
            if heir not in names:
                heir = min(live, key=lambda member: (member.state == "draining", load[member.name])).name
        if heir is None:
            return f"the snapshot of fragment {fragment} was held by nobody else"
        if heir not in names:
            return f"the snapshot of fragment {fragment} was lost with worker {heir}"
        placement[fragment] = heir
        load[heir] += 1
    return tuple(placement)


def _in_blobs(run: Run) -> bool:
    """Whether the state of the common step can be fetched again, so that anybody may take a fragment."""
    return run.common_step == run.start


def _for_adopters(plan: Plan, placement: tuple[str, ...]) -> tuple[int, ...]:
    """`plan.weights_behind`, but whole backwards for the fragments of workers that get more than they had.

    These take no memory beside what has to be held, and less time in a replay, for which nobody waits but the adopter itself.
    """
    fuller = {worker for worker in placement if placement.count(worker) > plan.placement.count(worker)}
    return tuple(
        0 if worker in fuller else behind for worker, behind in zip(placement, plan.weights_behind, strict=False)
    )


class Adoption:
    """Changes of the placement of running jobs."""

    def __init__(self, books: Books, backups: Backups) -> None:
        self._books = books
        self._backups = backups

    def follow(
        self,
        job: Job,
        placement: tuple[str, ...],
        now: float,
        moved: Sequence[int] = (),
        weights_behind: tuple[int, ...] | None = None,
    ) -> None:
        """Make the next plan epoch with this placement, and have everybody follow it from the common step on.

        `moved` are the fragments that replay what followed. `weights_behind` is what was planned for this placement; in
        one that nobody planned, adopters run whole backwards.
        """
        run = job.run
        assert job.plan is not None
        assert run is not None
        job.epoch += 1
        if weights_behind is None:
            weights_behind = _for_adopters(job.plan, placement)
        changes = {"epoch": job.epoch, "placement": placement, "weights_behind": weights_behind}
        job.plan = job.plan.model_copy(update=changes)
        job.fragments = [
            summary
            if summary.worker == placement[summary.index]
            else summary.model_copy(update={"worker": placement[summary.index], "seconds": None})
            for summary in job.fragments
        ]
        job.finished = []
        run.round = None
        # Two workers or more hold each other's snapshots.
        run.standby = [name for name in run.standby if name not in placement and len(set(placement)) == 1]
        backups = self._backups.assign(job, job.plan)
        behind = sorted({*moved, *(run.switch.behind if run.switch is not None else ())})
        run.replaying = behind
        for fragment in moved:
            run.reached[fragment] = run.common_step
        run.switch = Switch(since=now, sent_at=now, awaited=list(job.hosts), behind=behind, until=run.highest)
        run.urgent = True
        self._books.do(ev.SavePlan(job.id, job.plan))
        self._books.save(job)
        self._send(job, tuple(job.hosts), backups)

    def again(self, job: Job, now: float) -> None:
        """The same placement in a new epoch: what was ordered before is over."""
        assert job.plan is not None
        self.follow(job, job.plan.placement, now)

    def adopted(self, job: Job, member: Member, message: Adopted, now: float) -> None:
        """A worker follows the new placement."""
        run = job.run
        if run is None or run.switch is None or message.epoch != job.epoch or member.name not in run.switch.awaited:
            return
        run.switch.awaited.remove(member.name)
        self._books.save(job, announce=False)

    def caught_up(self, job: Job, member: Member, message: CaughtUp) -> None:
        """Adopted fragments stand where the others do."""
        run = job.run
        if run is None or message.epoch != job.epoch or run.replayed.get(member.name) == job.epoch:
            return
        run.replayed[member.name] = job.epoch
        if run.switch is not None:
            run.switch.behind = [fragment for fragment in run.switch.behind if fragment not in message.fragments]
        if message.steps and set(message.fragments) & set(run.replaying):
            self._books.story(
                job,
                "replayed",
                f"{member.name} replayed {message.steps} {plural('step', message.steps)} in {format_seconds(message.seconds)}",
                worker=member.name,
                steps=message.steps,
                seconds=message.seconds,
            )
        self._books.save(job, announce=False)

    def watch(self, job: Job, now: float) -> bool:
        """Whether the switch is over; says again to who is slow to answer what may have been lost on the way."""
        run = job.run
        assert run is not None
        switch = run.switch
        if switch is None:
            return True
        switch.behind = [fragment for fragment in switch.behind if run.reached.get(fragment, 0) < switch.until]
        if not switch.awaited and not switch.behind:
            run.switch = None
            self._books.save(job)
            return True
        if switch.awaited and now - switch.sent_at >= job.spec.fault_tolerance.failure_timeout:
            self.say_again(job, now)
        return False

    def say_again(self, job: Job, now: float) -> None:
        """Send the new placement to all that have not said to follow it."""
        run = job.run
        assert run is not None
        if run.switch is not None:
            run.switch.sent_at = now
            self._send(job, tuple(run.switch.awaited), run.backups)

    def _send(self, job: Job, workers: tuple[str, ...], backups: dict[int, str]) -> None:
        assert job.plan is not None
        assert job.run is not None
        message = Adopt(
            job=job.id,
            plan=job.plan,
            step=job.run.common_step,
            peers=self._books.addresses(job),
            backups=backups,
        )
        self._books.tell(job, message, workers)
