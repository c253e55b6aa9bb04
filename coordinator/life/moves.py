"""Fragments change their host in good order: when a worker leaves, joins or slows down.

Everybody stops after one common step, each moving fragment's snapshot goes to its new host, and the new placement holds
from there on; nothing is run again. Where that would take long, nobody stops, unless a worker leaves: the moving fragments replay what
was trained while their snapshots were under way, as after a loss. A worker that is new to the job builds what it needs before
that. So does one that is to hold snapshots only (`standby.py`).
"""

from __future__ import annotations

from collections.abc import Collection

from coordinator.life import events as ev
from coordinator.life import recut, setbacks, slowness, standby
from coordinator.life.adoption import Adoption
from coordinator.life.backup_workers import choose
from coordinator.life.backups import Backups
from coordinator.life.books import Books
from coordinator.life.jobs import Job
from coordinator.life.pool import Member
from coordinator.life.run import Move
from fusion.messages import Connect, Connected, PeerAddress, Ready, Stop
from fusion.plan import Plan
from fusion.units import format_seconds, plural

_GAIN = 0.9
"""A move that only makes a job faster must bring the predicted step time down to this share."""
_STEPS_BETWEEN = 10
_ASK_SECONDS = 5.0
"""Between two questions to the scheduler."""
_UPLOAD_PATIENCE = 60.0


class Moves:
    """Moves of running jobs. `advance` is called whenever no round and no other change of placement is under way."""

    def __init__(self, books: Books, backups: Backups, adoption: Adoption) -> None:
        self._books = books
        self._backups = backups
        self._adoption = adoption

    # Whether and where to -----------------------------------------------------------------------------------------

    def leaving(self, job: Job) -> list[Member]:
        """Hosts that leave and still have fragments."""
        assert job.plan is not None
        return [
            member
            for member in self._books.hosts(job)
            if member.state == "draining" and member.name in job.plan.workers
        ]

    def possible(self, job: Job) -> bool:
        """Whether somebody could take the fragments of the workers that leave."""
        run = job.run
        if job.state != "running" or run is None or job.train.steps - run.highest <= run.margin:
            return False
        return not run.cant_move and bool(self.candidates(job))

    def takes(self, job: Job) -> float:
        """About how many seconds the snapshots of a move take; 0 where nothing is known of that."""
        return self._backups.seconds(job, job.run.backups) if job.run is not None else 0.0

    def candidates(self, job: Job) -> list[Member]:
        """Workers that a new placement may use: those of the job that stay, and idle ones that nobody waits for.

        An idle one that did not get ready lately is left alone; after that it comes behind the others.
        """
        stay = [member for member in self._books.hosts(job) if member.state != "draining"]
        if any(other.state == "queued" for other in self._books.jobs.values()):
            return stay
        wanted, run = job.spec.plan.workers, job.run
        idle = self._books.pool.idle()
        if run is not None and run.setbacks:
            able = [member for member in idle if not setbacks.barred(run, member)]
            idle = sorted(able, key=lambda member: setbacks.times(run, member))
        return stay + (idle if wanted is None else idle[: max(0, wanted - len(stay))])

    def advance(self, job: Job, now: float) -> bool:
        """Take the next step of a move if there is one; True when a round was ordered for it."""
        run = job.run
        assert run is not None
        move = run.move
        if move is None:
            self._try_again_when_due(job, now)
            if not self._stand_by_when_wanted(job, now):
                self._ask_when_wanted(job, now)
            return False
        if move.unready or move.unconnected:
            if self._waited_enough(job, move, now):
                missing = ", ".join(dict.fromkeys([*move.unready, *move.unconnected]))
                # Who can't reach several newcomers does not say which of them.
                self.abandon(job, now, f"{missing} did not get ready", blamed=move.unready or move.newcomers)
            return False
        if job.plan is not None and move.placement == job.plan.placement:
            self._stand_by(job, move)
            return False
        return self._order(job, move, now)

    def _waited_enough(self, job: Job, move: Move, now: float) -> bool:
        """Whether newcomers have had their time: less of it when somebody leaves, or another worker has come meanwhile."""
        run, hosts = job.run, self._books.hosts(job)
        assert run is not None
        newcomers = [member for member in hosts if member.name in move.newcomers]
        setbacks.note_growth(move, newcomers, now)
        if setbacks.overdue(run, move, newcomers, now):
            return True
        stay = [member for member in hosts if member.state != "draining" and member.name not in move.newcomers]
        if stay and not run.cant_move and self.leaving(job):
            # What is left of the leaving worker's patience is for a move without them.
            return now - move.since > min(setbacks.PATIENCE, self._books.timing.drain_patience / 2)
        others = [member for member in self.candidates(job) if member.name not in job.hosts]
        return now - move.since > setbacks.PATIENCE and any(other.joined_at > move.since for other in others)

    def _try_again_when_due(self, job: Job, now: float) -> None:
        run = job.run
        assert run is not None
        if run.setbacks and (due := setbacks.lift_due(run, now)):
            self._reconsider(job, due)

    def _reconsider(self, job: Job, names: Collection[str]) -> None:
        """These workers, which were left alone, may be tried again."""
        run = job.run
        assert run is not None
        able = [member.name for member in self.candidates(job) if member.name in names and member.name not in job.hosts]
        if able:
            run.cant_move = ""
            run.reconsider = run.reconsider or f"worker {', '.join(able)} is tried again"
        self._books.save(job, announce=False)

    def _ask_when_wanted(self, job: Job, now: float) -> None:
        run = job.run
        assert run is not None
        leaving = self.leaving(job) if not run.cant_move else []
        if run.asked_for_move is not None or not (leaving or self._may_rebalance(job, now)):
            return
        candidates = self.candidates(job)
        if not candidates:
            return
        job.attempt += 1
        run.asked_for_move, run.asked_at = job.attempt, now
        run.asked_because = f"worker {leaving[0].name} leaves" if leaving else run.reconsider
        run.reconsider = ""
        names = tuple(member.name for member in candidates)
        drift = slowness.factors(job)
        slower = {member.name: member.slower * drift.get(member.name, 1.0) for member in candidates}
        anew = recut.possible(job)
        self._books.do(ev.MakePlan(job.id, job.attempt, names, job.plan, slower, price=True, recut=anew))
        self._books.save(job, announce=False)

    def _may_rebalance(self, job: Job, now: float) -> bool:
        run = job.run
        assert run is not None
        if not run.reconsider:
            slow = slowness.slow_worker(job)
            if slow is None:
                return False
            run.reconsider = f"worker {slow} has become slower"
        return (
            run.pace > 0
            and job.train.steps - run.highest >= _STEPS_BETWEEN
            and (run.asked_at is None or now - run.asked_at >= _ASK_SECONDS)
            and (run.moved_at is None or now - run.moved_at >= self._books.timing.move_pause)
            and (run.moved_step is None or run.highest - run.moved_step >= _STEPS_BETWEEN)
        )

    # What the scheduler says --------------------------------------------------------------------------------------

    def planned(self, job: Job, event: ev.PlanMade | ev.PlanRefused) -> None:
        """The scheduler has answered: begin to move if that is called for."""
        run = job.run
        assert run is not None
        assert job.plan is not None
        run.asked_for_move, cause = None, run.asked_because
        leaving, now = self.leaving(job), event.time
        if isinstance(event, ev.PlanRefused):
            if leaving:
                run.cant_move = event.reason
                self._books.story(job, "no-move", f"the fragments of job {job.id} can't move: {event.reason}")
            return
        if news := recut.consider(job, event):
            self._books.story(job, "recut", news)
        placement = event.plan.placement
        if placement == job.plan.placement or event.plan.cuts != job.plan.cuts:
            return
        usable = {member.name: member for member in self.candidates(job)}
        if not set(placement) <= set(usable) or run.switch is not None:
            run.reconsider = run.reconsider or cause  # The pool has changed meanwhile.
            return
        if not leaving and job.spec.plan.workers is not None and len(set(placement)) < len(job.plan.workers):
            return  # Asked for by number: a prediction is no reason to send one of them away.
        before, after = event.current_seconds, event.plan.predicted_step_seconds
        if not leaving and (before is None or after is None or after > _GAIN * before):
            return
        newcomers = [name for name in dict.fromkeys(placement) if name not in job.hosts]
        others = list(job.hosts)
        behind = event.plan.weights_behind
        run.move = Move(placement=placement, weights_behind=behind, cause=cause, newcomers=newcomers, since=now)
        if newcomers:
            run.move.unready, run.move.unconnected = list(newcomers), others
            self._take_in(job, [usable[name] for name in newcomers], others)
        self._books.save(job, announce=False)

    # Standing by --------------------------------------------------------------------------------------------------

    def _stand_by_when_wanted(self, job: Job, now: float) -> bool:
        """Have an idle worker get ready to hold the snapshots of a job that is on one worker only."""
        run, plan = job.run, job.plan
        assert run is not None
        assert plan is not None
        if run.asked_for_move is not None or not standby.wanted(job):
            return False
        newcomer = next((member for member in self.candidates(job) if member.name not in job.hosts), None)
        if newcomer is None:
            return False
        others = list(job.hosts)
        cause = f"all fragments are on {plan.workers[0]}"
        run.move = Move(placement=plan.placement, cause=cause, newcomers=[newcomer.name], since=now)
        run.move.unready, run.move.unconnected = [newcomer.name], others
        self._take_in(job, [newcomer], others)
        self._books.save(job, announce=False)
        return True

    def _stand_by(self, job: Job, move: Move) -> None:
        run, plan = job.run, job.plan
        assert run is not None
        assert plan is not None
        run.move, run.standby = None, list(move.newcomers)
        setbacks.forget(run, move.newcomers)
        self._backups.assign(job, plan)
        run.urgent = True
        names = ", ".join(run.standby)
        self._books.story(
            job, "stands-by", f"worker {names} holds snapshots of job {job.id}, because {move.cause}", worker=names
        )
        self._books.save(job)

    # Newcomers ----------------------------------------------------------------------------------------------------

    def _take_in(self, job: Job, newcomers: list[Member], others: list[str]) -> None:
        assert job.plan is not None
        assert job.run is not None
        for member in newcomers:
            member.state, member.job = "busy", job.id
            job.hosts[member.name] = member.incarnation
            self._books.do(ev.SaveWorker(member.name))
        addresses = [
            PeerAddress(worker=member.name, endpoint=member.endpoint, public_key=member.public_key)
            for member in newcomers
        ]
        self._books.tell(job, Connect(job=job.id, peers=addresses), tuple(others))
        self._books.do(
            ev.PrepareWorkers(
                job.id,
                job.epoch,
                job.plan,
                tuple(self._books.addresses(job)),
                tuple(member.incarnation for member in newcomers),
                # Not the newest one: a newcomer may get a fragment in the state in which the run began.
                None if job.run.from_origin else job.run.start,
                dict(job.run.backups),
                joining=True,
            )
        )

    def ready(self, job: Job, member: Member, message: Ready) -> None:
        """A newcomer has built what it needs."""
        move = job.run.move if job.run is not None else None
        if move is not None and message.epoch == job.epoch and member.name in move.unready:
            move.unready.remove(member.name)
            self._books.save(job, announce=False)

    def ready_late(self, job: Job, member: Member) -> None:
        """A worker that was given up has got ready after all: next time it is waited for longer."""
        if job.run is not None and setbacks.lift_late(job.run, member):
            self._reconsider(job, [member.name])

    def connected(self, job: Job, member: Member, message: Connected) -> None:
        """A host can reach the newcomers."""
        move = job.run.move if job.run is not None else None
        if move is not None and member.name in move.unconnected and set(move.newcomers) <= set(message.peers):
            move.unconnected.remove(member.name)
            self._books.save(job, announce=False)

    def is_newcomer(self, job: Job, member: Member) -> bool:
        """Whether the worker takes part only for a move that is not done yet."""
        return job.run is not None and job.run.move is not None and member.name in job.run.move.newcomers

    def abandon(self, job: Job, now: float, why: str, *, blamed: Collection[str] = (), pause: bool = False) -> None:
        """Give a move up that has not been made; newcomers are free again.

        Those that are `blamed` are left alone for a while, and what is possible without them is looked at. With `pause`,
        the next move waits, whoever it is with.
        """
        run = job.run
        if run is None or run.move is None:
            return
        move, run.move = run.move, None
        if pause:
            run.moved_at = now
        if job.plan is not None and move.placement == job.plan.placement:
            what = f"worker {', '.join(move.newcomers)} does not stand by"
        else:
            what = f"fragments don't move because {move.cause}"
        newcomers = [member for member in self._books.hosts(job) if member.name in move.newcomers]
        later = ""
        for member in newcomers:
            if member.name in blamed:
                seconds = setbacks.bar(run, member, now, slow=member.name in move.unready)
                later += f"; worker {member.name} is left alone for {format_seconds(seconds)}"
                run.reconsider = run.reconsider or why
        self._books.story(job, "move-given-up", f"job {job.id}: {what}: {why}{later}")
        for member in newcomers:
            self._let_go(job, member, why)
        self._books.save(job)

    # The move -----------------------------------------------------------------------------------------------------

    def _order(self, job: Job, move: Move, now: float) -> bool:
        run, plan = job.run, job.plan
        assert run is not None
        assert plan is not None
        after = plan.model_copy(update={"placement": move.placement})
        backups, _ = choose(job, after, self._books.hosts(job), run.backups, self._books.links)
        moving = [index for index, host in enumerate(plan.placement) if host != move.placement[index]]
        backups = {**backups, **{index: move.placement[index] for index in moving}}
        carried = self._backups.seconds(job, backups)
        stops = bool(self.leaving(job)) or carried <= self._books.timing.longest_stop
        if self._backups.order_for_move(job, now, backups, carried, hold=stops):
            return True
        self.abandon(job, now, "the job is about to end", pause=True)
        return False

    def perform(self, job: Job, now: float) -> None:
        """Every snapshot is held: the new placement holds from here on. Who did not stop has gone on since, and is replayed."""
        run, plan = job.run, job.plan
        assert run is not None
        assert run.round is not None
        assert plan is not None
        if not run.round.hold and job.train.steps - run.highest < _STEPS_BETWEEN:
            run.round = None
            self.abandon(job, now, "the job is about to end", pause=True)
            return
        stopped, step = run.round.hold, self._backups.settle(job)
        move, run.move = run.move, None
        if move is None:
            self._adoption.again(job, now)
            return
        moving = [index for index, host in enumerate(plan.placement) if host != move.placement[index]]
        self._tell(job, plan, move, step)
        # Who gave a fragment away keeps its snapshot, or the new host would be the only one to have it.
        run.holders.update((index, host) for index, host in enumerate(plan.placement) if host != move.placement[index])
        run.moved_at, run.moved_step = now, step
        setbacks.forget(run, move.newcomers)
        for worker in plan.workers:
            if worker not in move.placement:
                run.left[worker] = list(plan.fragments_of(worker))
        replaying = () if stopped else moving
        self._adoption.follow(job, move.placement, now, replaying, weights_behind=move.weights_behind)

    def _tell(self, job: Job, plan: Plan, move: Move, step: int) -> None:
        for worker in dict.fromkeys(move.placement):
            taken = [
                index for index, host in enumerate(move.placement) if host == worker and plan.placement[index] != worker
            ]
            if taken:
                which = f"{plural('fragment', len(taken))} {', '.join(map(str, taken))}"
                self._books.story(
                    job, "moved", f"{which} -> {worker} at step {step} ({move.cause})", worker=worker, step=step
                )

    # Workers without fragments ------------------------------------------------------------------------------------

    def release_empty(self, job: Job, now: float) -> None:
        """Let workers go that have no fragments any more, once nobody needs what they have.

        That is their share of the last checkpoint, and the snapshots of their fragments until the new hosts' backups have newer.
        """
        run = job.run
        assert run is not None
        assert job.plan is not None
        working = set(job.plan.placement)
        if working.issuperset(job.hosts):
            return  # As nearly always; this is asked at every report.
        for member in self._books.hosts(job):
            if member.name in working or self.is_newcomer(job, member):
                continue
            if standby.keeps(job, member, self._books.jobs.values()):
                continue
            patient = run.moved_at is None or now - run.moved_at < _UPLOAD_PATIENCE
            # One worker alone takes no snapshots, so nothing newer would come.
            holds = len(job.plan.workers) > 1 and member.name in run.holders.values()
            if patient and (holds or self._awaited(job, run.left.get(member.name, []), run.moved_step or 0)):
                continue
            run.left.pop(member.name, None)
            run.holders = {fragment: holder for fragment, holder in run.holders.items() if holder != member.name}
            if member.name in run.standby:
                run.standby.remove(member.name)
                if run.round is not None and not run.round.hold:
                    run.round = None  # Nobody is left to hold its snapshots.
                self._backups.assign(job, job.plan)
                self._let_go(job, member, "its snapshots are needed no more")
            else:
                self._let_go(job, member, "its fragments have moved")

    def _awaited(self, job: Job, fragments: list[int], step: int) -> bool:
        """Whether a checkpoint lacks parts of these fragments that their former host is to upload."""
        every = job.train.checkpoint_every
        assert job.run is not None
        if not every:
            return False
        due = step - step % every
        if due <= max(job.run.start, job.checkpoint or 0) or due in job.writing:
            return False
        return bool(set(fragments) - set(job.parts.get(due, {})))

    def _let_go(self, job: Job, member: Member, why: str) -> None:
        job.hosts.pop(member.name, None)
        self._books.do(ev.Send(member.incarnation, Stop(job=job.id, reason=why)))
        self._books.free(member)
        self._books.save(job)
