"""Backup rounds: every so often the snapshots of one common step go to backup workers, and then older ones are forgotten.

A round is ordered for a step that nobody has reached yet, so that the snapshots of all fragments are of the same step. It
is complete when every snapshot is held and everybody is through with the step. Only then is the step recorded as the
common one, and only after that are workers told that they may forget what came before.
"""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.life import progress
from coordinator.life.backup_pace import MOST_STEPS, carrying, spread, steps_to_next
from coordinator.life.backup_workers import choose
from coordinator.life.books import Books
from coordinator.life.jobs import Job
from coordinator.life.pool import Member
from coordinator.life.run import PATIENCE, SMALLEST_MARGIN, Round, Run
from fusion.messages import Backup, BackupFailed, Commit, Holding, Paused
from fusion.plan import Plan

_LARGEST_MARGIN = 256
_PATIENCE_FACTOR = 3.0
"""A round is stuck when it takes so many times as long as the last one, or as its snapshots should take."""


class Backups:
    """The rounds of running jobs."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def assign(self, job: Job, plan: Plan) -> dict[int, str]:
        """Choose backup workers for `plan`, note them in the job's run, and tell people who has none."""
        run = job.run
        assert run is not None
        run.backups, why = choose(job, plan, self._books.hosts(job), run.backups, self._books.links)
        if why != run.alone:
            run.alone = why
            if why:
                self._books.story(job, "no-backup", f"job {job.id} runs without a backup: {why}")
        return run.backups

    def seconds(self, job: Job, backups: Mapping[int, str]) -> float:
        """What these snapshots take on the busiest link; where that is not measured, what those of the last round took."""
        assert job.plan is not None
        assert job.run is not None
        carried = carrying(job, job.plan, backups, self._books.links)
        return job.run.cost if carried is None else carried

    def order_when_due(self, job: Job, now: float) -> None:
        """Order the next round when it is time, for a step that nobody has reached."""
        run = job.run
        assert run is not None
        if job.plan is None or len(job.plan.workers) + len(run.standby) < 2:
            return
        hurried = run.urgent or self._logs_fill(job, run)
        # Asked with every report: links are looked up only once nothing else stands in the way.
        wanted = steps_to_next(job, job.plan, run, 0.0)
        if not hurried and run.highest + run.margin < run.common_step + wanted:
            return
        carried = carrying(job, job.plan, run.backups, self._books.links)
        wanted = steps_to_next(job, job.plan, run, carried)
        due = run.common_step + (1 if hurried else wanted)
        if run.highest + run.margin >= due:
            run.spacing = max(wanted, MOST_STEPS)
            seconds = 0.0 if hurried else spread(wanted * run.pace, carried)
            run.patience = max(run.patience, _PATIENCE_FACTOR * max(seconds, carried or 0.0))
            self.order(job, now, max(due, run.highest + run.margin), run.backups, seconds=seconds)

    def order_for_move(self, job: Job, now: float, backups: dict[int, str], carried: float, *, hold: bool) -> bool:
        """Order, as soon as can be, the snapshots with which fragments move; False when the job ends before."""
        run = job.run
        assert run is not None
        run.patience = max(run.patience, _PATIENCE_FACTOR * carried)
        return self.order(job, now, run.highest + run.margin, backups, moves=True, hold=hold)

    def order(
        self,
        job: Job,
        now: float,
        step: int,
        backups: dict[int, str],
        *,
        moves: bool = False,
        hold: bool = False,
        seconds: float = 0.0,
    ) -> bool:
        """Order the snapshots of `step`, or of an earlier one if the job ends before; False when there is none.

        The last step is left out: whoever adopts a fragment then still has its last state to bring in.
        """
        run = job.run
        assert run is not None
        last = job.train.steps - 1
        if run.highest + SMALLEST_MARGIN <= last:
            step = min(step, last)
        if step > last:
            return False
        run.round = Round(
            step=step,
            epoch=job.epoch,
            backups=dict(backups),
            moves=moves,
            hold=hold,
            seconds=seconds,
            ordered_at=now,
            said_at=now,
        )
        if run.common_step > run.start:
            # Said again, in case that it was lost: who holds a snapshot keeps it only while it may be the common one.
            self._books.tell(job, Commit(job=job.id, epoch=job.epoch, step=run.common_step))
        if backups or hold:
            self._tell(job, run.round)
        self._books.save(job, announce=False)
        return True

    def say_again(self, job: Job, now: float) -> None:
        """Order the round again when its step is long in coming: a host whose log is full goes no further without it."""
        run = job.run
        assert run is not None
        found = run.round
        if found is None or run.highest >= found.step or now - found.said_at < job.spec.fault_tolerance.failure_timeout:
            return
        found.said_at = now
        self._tell(job, found, again=True)

    def _tell(self, job: Job, found: Round, *, again: bool = False) -> None:
        self._books.tell(
            job,
            Backup(
                job=job.id,
                epoch=found.epoch,
                step=found.step,
                backups=found.backups,
                hold=found.hold,
                log_own=found.moves and not found.hold,
                again=again,
                seconds=found.seconds,
            ),
        )

    def held(self, job: Job, member: Member, message: Holding) -> None:
        """A snapshot is whole at its backup worker."""
        found = self._of_round(job, message.epoch, message.step)
        if found is None or found.backups.get(message.fragment) != member.name or message.fragment in found.held:
            return
        found.held.append(message.fragment)
        # A worker says it again to a coordinator that was away, and there is one of these for each fragment of a round.
        self._books.save(job, announce=False, soon=True)

    def paused(self, job: Job, member: Member, message: Paused) -> None:
        found = self._of_round(job, message.epoch, message.step)
        if found is None or not found.hold or member.name in found.paused:
            return
        found.paused.append(member.name)
        self._books.save(job, announce=False)

    def failed(self, job: Job, member: Member, message: BackupFailed) -> bool:
        """A snapshot can't be taken or kept, or its fragment not be built; True when that is the end of the round."""
        run, found = job.run, self._of_round(job, message.epoch, message.step)
        if run is None:
            return False
        if found is None:
            return message.cause == "memory" and self._cant_stand_by(job, run, member, message)
        where = found.backups.get(message.fragment, member.name)
        match message.cause:
            case "passed":
                run.margin = min(2 * run.margin, _LARGEST_MARGIN)
            case "corrupt":
                self._books.story(
                    job,
                    "snapshot-damaged",
                    f"the snapshot of fragment {message.fragment} arrived damaged at {where} (step {found.step}); "
                    "it is taken again",
                )
            case "memory":
                # Its own host can't make a copy for anybody.
                full = [where] if member.name == where else list(job.hosts)
                refused = run.refused.setdefault(message.fragment, [])
                refused.extend(name for name in full if name not in refused)
                self._books.story(
                    job,
                    "snapshot-refused",
                    f"worker {member.name} has no room for the snapshot of fragment {message.fragment}"
                    + (f": {message.message}" if message.message else ""),
                )
        return True

    def _cant_stand_by(self, job: Job, run: Run, member: Member, message: BackupFailed) -> bool:
        """Who has no room to build a fragment that it is to take over says so when it finds out, in a round or between two.

        What it holds stays the common snapshot until the next one is held by somebody else. A round in which fragments move goes on:
        they don't go there. Said once, it counts whatever has become of the plan meanwhile. True when that is the end of the round.
        """
        fragment = message.fragment
        if run.backups.get(fragment) != member.name or member.name in run.refused.get(fragment, ()):
            return False
        run.refused.setdefault(fragment, []).append(member.name)
        why = f": {message.message}" if message.message else ""
        self._books.story(
            job, "snapshot-refused", f"worker {member.name} has no room to take over fragment {fragment}{why}"
        )
        assert job.plan is not None
        self.assign(job, job.plan)
        self._books.save(job, announce=False)
        return run.round is not None and not run.round.moves

    def _of_round(self, job: Job, epoch: int, step: int) -> Round | None:
        found = job.run.round if job.run is not None else None
        return found if found is not None and (found.epoch, found.step) == (epoch, step) else None

    def complete(self, job: Job, now: float) -> bool:
        """Whether every snapshot of the round is held and everybody is through with its step."""
        run = job.run
        assert run is not None
        assert run.round is not None
        assert job.plan is not None
        found = run.round
        if found.taken_at is None and run.highest >= found.step:
            found.taken_at = now
        if len(found.held) < len(found.backups):
            return False
        if found.taken_at is not None and found.cost is None:
            found.cost = now - found.taken_at
        if found.hold:
            return set(found.paused) >= set(job.plan.workers)
        through = found.step + progress.evaluation_due(job, found.step)
        return all(run.reached.get(fragment, run.start) >= through for fragment in range(len(job.plan.placement)))

    def stuck(self, job: Job, now: float) -> bool:
        """Whether the round has taken so long that an order or an answer must have been lost."""
        run = job.run
        assert run is not None
        found = run.round
        if found is None or now - max(found.ordered_at, found.taken_at or 0.0) < run.patience:
            return False
        # Before the step itself is done nothing can be late.
        if run.highest < found.step and not found.paused:
            return False
        run.patience *= 2
        return True

    def settle(self, job: Job) -> int:
        """The round is complete: its step is the common one from now on. Returns it."""
        run = job.run
        assert run is not None
        assert run.round is not None
        found, run.round = run.round, None
        run.common_step, run.holders = found.step, dict(found.backups)
        run.since_epoch = job.epoch + found.hold  # With a hold, a new placement follows at once.
        run.cost = found.cost or 0.0
        run.margin = max(SMALLEST_MARGIN, run.margin - 1)
        # The next one may take as long, and what has come of it by then would be thrown away.
        run.patience = max(PATIENCE, _PATIENCE_FACTOR * run.cost)
        run.urgent = False
        run.log_bytes = {}
        job.commits += 1
        return found.step

    def commit(self, job: Job) -> None:
        """Record the round's step as the common one, then let workers forget what came before."""
        step = self.settle(job)
        self._books.save(job)
        self._books.tell(job, Commit(job=job.id, epoch=job.epoch, step=step))

    def _logs_fill(self, job: Job, run: Run) -> bool:
        return max(run.log_bytes.values(), default=0) > job.spec.fault_tolerance.log_memory / 2
