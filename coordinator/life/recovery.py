"""Keeps running jobs alive: what their workers say of snapshots and placements comes in here, and losses are decided here.

At any time a job has at most one of these under way, in this order of precedence: a change of placement, a round of
snapshots, a move that is being prepared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from coordinator.life import events as ev
from coordinator.life import setbacks
from coordinator.life.adoption import Adoption, heirs
from coordinator.life.backups import Backups
from coordinator.life.books import Books
from coordinator.life.jobs import Job
from coordinator.life.membership import all_finished
from coordinator.life.moves import Moves
from coordinator.life.pool import Member
from coordinator.life.spot_checks import CheckMessage, SpotChecks
from fusion.messages import Adopted, BackupFailed, CantAdopt, CaughtUp, Holding, Paused, PeerLost
from fusion.units import plural

PROBE_SECONDS = 0.3
"""Between two probes of one worker."""

_NEW_SECONDS = 60.0

Restart = Callable[[Job, float, str], None]
"""(job, now, cause): back to the last checkpoint."""

RecoveryMessage = Holding | BackupFailed | Paused | Adopted | CantAdopt | CaughtUp | CheckMessage


class Recovery:
    """Snapshots, adoptions and moves of running jobs."""

    def __init__(self, books: Books, restart: Restart, checks: SpotChecks) -> None:
        self._books = books
        self._checks = checks
        self._restart = restart
        self.backups = Backups(books)
        self.adoption = Adoption(books, self.backups)
        self.moves = Moves(books, self.backups, self.adoption)
        self._probed: dict[str, float] = {}
        """Incarnations at whose doors somebody has just asked, and when."""
        self._suspected: dict[str, Member] = {}
        """Incarnation -> who is to be asked again, because somebody complained right after it was asked."""
        self._idle: set[str] = set()

    def restore(self, job: Job, now: float) -> None:
        """Take a running job up again: half a round is given up, a change of placement is said again."""
        run = job.run
        if run is None:
            return
        run.asked_for_move = None
        if run.move is not None:
            self.moves.abandon(job, now, "the coordinator was restarted")
        if run.round is not None:
            self._give_up_round(job, now)
        elif run.switch is not None:
            self.adoption.say_again(job, now)

    def advance(self, job: Job, now: float) -> None:
        """Take the next step of whatever is under way."""
        run = job.run
        if job.state != "running" or run is None or job.plan is None:
            return
        if all_finished(job):
            self._checks.settled(job, now, job.train.steps)
            return
        if not self.adoption.watch(job, now):
            return
        self.moves.release_empty(job, now)
        if run.round is not None:
            if self.backups.complete(job, now):
                if not self._checks.settled(job, now, run.round.step):
                    return
                if run.round.moves:
                    self.moves.perform(job, now)
                    return
                self.backups.commit(job)
            elif self.backups.stuck(job, now):
                self._give_up_round(job, now)
            else:
                self.backups.say_again(job, now)
            if run.round is not None or run.switch is not None:
                return
        if not self.moves.advance(job, now):
            self.backups.order_when_due(job, now)

    def heard(self, job: Job, member: Member, message: RecoveryMessage, now: float) -> None:
        """Take in what a worker says."""
        match message:
            case Holding():
                self.backups.held(job, member, message)
            case Paused():
                self.backups.paused(job, member, message)
            case BackupFailed():
                if self.backups.failed(job, member, message):
                    if message.cause == "memory" and job.plan is not None:
                        self._no_room(job, now)
                    self._give_up_round(job, now)
            case Adopted():
                self.adoption.adopted(job, member, message, now)
            case CaughtUp():
                self.adoption.caught_up(job, member, message)
            case CantAdopt():
                if message.epoch == job.epoch:
                    self._restart(job, now, f"worker {member.name} can't take over: {message.message}")
            case _:
                self._checks.heard(job, member, message)

    def _no_room(self, job: Job, now: float) -> None:
        assert job.plan is not None
        assert job.run is not None
        self.backups.assign(job, job.plan)
        if job.run.move is not None and job.run.round is not None and job.run.round.moves:
            job.run.cant_move = "its new host has no room for a fragment"
            self.moves.abandon(job, now, job.run.cant_move, blamed=job.run.move.newcomers, pause=True)

    def _give_up_round(self, job: Job, now: float) -> None:
        run = job.run
        assert run is not None
        if run.round is None:
            return
        hold, run.round = run.round.hold, None
        if hold:
            self.adoption.again(job, now)  # Whoever has stopped goes on.
        self._books.save(job, announce=False)

    def notice_idle(self, now: float) -> None:
        """Workers have become free: running jobs may be able to use them."""
        idle = {member.incarnation: member for member in self._books.pool.idle()}
        fresh = idle.keys() - self._idle
        for job in self._books.jobs.values() if fresh else ():
            if job.state != "running" or job.run is None:
                continue
            for member in self.moves.candidates(job):
                if member.incarnation in fresh:
                    what = "joined" if now - member.joined_at < _NEW_SECONDS else "is free"
                    job.run.cant_move = ""
                    job.run.reconsider = f"worker {member.name} {what}"
        self._idle = set(idle)

    def give_up_move(self, job: Job, now: float, why: str, *, blamed: Sequence[str] = ()) -> None:
        """A move that has not been made won't be; its snapshots are not waited for."""
        self.moves.abandon(job, now, why, blamed=blamed)
        if job.run is not None and job.run.round is not None and job.run.round.moves:
            self._give_up_round(job, now)

    # Losses -------------------------------------------------------------------------------------------------------

    def suspect(self, job: Job, message: PeerLost, now: float) -> None:
        """A worker's connection to a peer was closed; whether the peer is gone is found out at its door."""
        member = self._books.pool.get(message.peer)
        if member is None or not member.live or job.hosts.get(member.name) != member.incarnation:
            return
        if self._books.relays.hides(member.name):
            return  # Its door is shut to strangers, or another's stands there.
        self._suspected[member.incarnation] = member
        self.knock(now)

    def knock(self, now: float) -> None:
        """Ask at the doors of those that are suspected, of each one every now and then."""
        self._probed = {who: asked for who, asked in self._probed.items() if now - asked < PROBE_SECONDS}
        for incarnation, member in list(self._suspected.items()):
            if incarnation not in self._probed:
                del self._suspected[incarnation]
                if member.live:
                    self._probed[incarnation] = now
                    self._books.do(ev.ProbeWorker(member.name, member.incarnation, member.endpoint))

    def hand_over(self, job: Job, member: Member, now: float) -> bool:
        """Let a worker go, and others adopt its fragments from their snapshots; False when that can't be."""
        others = [other for other in self._books.hosts(job) if other.name != member.name]
        if job.state != "running" or job.run is None or job.plan is None or isinstance(heirs(job, others), str):
            return False
        self._books.leave(member, "drained")
        self.lost(job, [member], now, f"worker {member.name} leaves")
        return True

    def lost(self, job: Job, members: Sequence[Member], now: float, cause: str = "") -> None:
        """Workers of the job are gone: others adopt their fragments, or the job goes back to its checkpoint."""
        if all_finished(job):
            return
        names = [member.name for member in members]
        if not cause:
            cause = f"{plural('worker', len(names))} {', '.join(names)} {'were' if len(names) > 1 else 'was'} lost"
        run, plan = job.run, job.plan
        if job.state != "running" or run is None or plan is None:
            self._restart(job, now, cause)
            return
        for name in names:
            del job.hosts[name]
            run.log_bytes.pop(name, None)
            run.left.pop(name, None)
        run.standby = [name for name in run.standby if name in job.hosts]
        self.moves.abandon(job, now, cause)
        if not set(names).isdisjoint(plan.workers):
            setbacks.lift_all(run)  # Whoever may help is wanted now.
        run.asked_at = None
        run.cant_move = ""
        live = self._books.hosts(job)
        placement = heirs(job, live)
        if isinstance(placement, str):
            self._restart(job, now, f"{cause}, and {placement}")
            return
        moved = [index for index, host in enumerate(placement) if host != plan.placement[index]]
        self._tell(job, placement, moved)
        self._drop_half_checkpoints(job, moved)
        run.holders = {fragment: holder for fragment, holder in run.holders.items() if holder in job.hosts}
        job.recoveries += bool(moved)
        run.reconsider = cause
        self.adoption.follow(job, placement, now, moved)

    def _tell(self, job: Job, placement: tuple[str, ...], moved: list[int]) -> None:
        assert job.run is not None
        step = job.run.common_step
        source = f"from snapshot of step {step}" if step != job.run.start else f"from step {step}"
        for worker in Counter(placement[index] for index in moved):
            mine = [index for index in moved if placement[index] == worker]
            self._books.story(
                job,
                "adoption",
                f"{worker} adopts {plural('fragment', len(mine))} {', '.join(map(str, mine))} {source}",
                worker=worker,
                step=step,
            )

    def _drop_half_checkpoints(self, job: Job, lost: list[int]) -> None:
        """Steps up to the common one are not run again, so what a lost worker did not upload of them won't come."""
        assert job.run is not None
        for step in sorted(job.parts):
            lacking = [fragment for fragment in lost if fragment not in job.parts[step]]
            if step <= job.run.common_step and step not in job.writing and lacking:
                self._books.do(ev.DropBlobs(tuple(ref.digest for ref in job.parts.pop(step).values())))
                self._books.story(
                    job,
                    "checkpoint-failed",
                    f"checkpoint at step {step} is given up: a worker was lost before it sent its part; training goes on",
                    step=step,
                )
