"""Backup rounds: every so often the snapshots of one common step go to backup workers, and then older ones are forgotten.

A round is ordered for a step that nobody has reached yet, so that the snapshots of all fragments are of the same step. It
is complete when every snapshot is held and everybody is through with the step. Only then is the step recorded as the
common one, and only after that are workers told that they may forget what came before.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal

from coordinator.life import progress
from coordinator.life.accusations import impartial_first
from coordinator.life.books import Books
from coordinator.life.jobs import Job
from coordinator.life.links import Links
from coordinator.life.pool import Member
from coordinator.life.run import PATIENCE, SMALLEST_MARGIN, Round, Run
from fusion.messages import Backup, BackupFailed, Commit, Holding, Paused
from fusion.plan import Plan
from fusion.units import format_bytes, plural
from scheduler.cost import optimizer_slots

_LARGEST_MARGIN = 256
_MOST_STEPS = 3
"""Steps between rounds where these cost little ..."""
_MOST_SECONDS = 5.0
"""... or fewer, where steps take long."""
_FEWEST_SECONDS = 0.25
"""Rounds closer together than this gain nothing that a person could notice."""
_PROBE_BYTES = 2**20
"""Links are compared by the time of a message of so many bytes,"""
_NEAR_SECONDS = 0.05
"""... of which so much is near for all purposes;"""
_FARTHER = 3.0
"""... a worker is farther than another when it takes so many times as long."""
_UNNOTICED = 0.1
"""Traffic that takes this share of a step more than that of another worker is as good."""
_LINK_SHARE = 60.0
"""Snapshots alone would keep any link busy for at most one part in so many of the time (`benchmarks/backup_overhead.py --link`
has what a step then takes)."""
_SPREAD = 4.0
"""Snapshots take so many times as long as they need to: the less of a link they take, the less do the training's messages wait, ..."""
_FELT_SECONDS = 0.25
"""... where they would keep a link busy for so long."""
_SPREAD_SHARE = 8.0
"""But a loss meanwhile replays what came since the round before: no longer than one part in so many of the time between rounds, ..."""
_LONGEST_SPREAD = 20.0
"""... nor than so many seconds, in which fragments that are to move wait."""
_SHARE = 10.0
"""Where nobody has measured the links: they are under way for at most one part in so many of the time;"""
_LEAST_SHARE = 2.0
"""... where the links are known, for one in so many, however much longer than by themselves they take."""
_WORK = 8e-9
"""Processor seconds for each byte of a snapshot, half of them at either end: checksums, copies, encryption. From a profile
of one worker that sends 5.5 MB and takes as much in."""
_OVERHEAD = 0.02
"""Share of a worker's time that this may take: less than the 3% that a step may be longer, as the logs cost too."""
_PATIENCE_FACTOR = 3.0
"""A round is stuck when it takes so many times as long as the last one, or as its snapshots should take."""
_GROWTH = 2
"""The steps between two rounds grow by this factor at most."""


def choose(
    job: Job,
    plan: Plan,
    members: Sequence[Member],
    previous: Mapping[int, str] | None = None,
    links: Links | None = None,
) -> tuple[dict[int, str], str]:
    """Fragment -> backup worker, and why some fragments have none, in words.

    A near one before a far one: snapshots should not cross slow links. Of near ones those of another machine come first, as a machine
    that goes takes all its workers along. Then, where what an adopter replays and goes on with would take a good part of a step, a
    host of neighbouring fragments before one that would have to talk to them. Of those that are alike the worker half way round
    the plan's ring, or the next after it that has room: never a neighbour while there are four, so that neighbours may be lost
    together. The `previous` one while it can be, because it has built the fragment already. A worker that leaves takes no backups.
    """
    there = (*plan.workers, *(job.run.standby if job.run is not None else ()))
    live = {member.name: member for member in members if member.state != "draining" and member.name in there}
    ring = [name for name in there if name in live]
    if len(there) < 2:
        return {}, "one worker only"
    slots = optimizer_slots(job.train.optimizer)
    sizes = {summary.index: summary.parameter_bytes for summary in job.fragments}
    room = {name: float(member.room_bytes or math.inf) for name, member in live.items()}
    for fragment, host in enumerate(plan.placement):
        if host in room:
            room[host] -= sizes.get(fragment, 0) * (2 + slots)
    refused = job.run.refused if job.run is not None else {}
    chosen: dict[int, str] = {}
    lacking: dict[int, int] = {}
    alone = True
    for fragment, host in enumerate(plan.placement):
        need = 2 * sizes.get(fragment, 0) * (1 + slots)  # The last snapshot stays until the next one is whole.
        at = (ring.index(host) + len(ring) // 2) % len(ring) if host in ring else 0
        candidates = [name for name in (*ring[at:], *ring[:at]) if name != host]
        alone = alone and not candidates
        if links is not None:
            candidates = _least_traffic_first(job, plan, fragment, candidates, links)
        candidates = _other_machines_first(host, candidates, live)
        if links is not None:
            candidates = _near_first(host, candidates, links)
        candidates = impartial_first(job.accusations, host, candidates)
        before = (previous or {}).get(fragment)
        if before in candidates:
            candidates = [before, *candidates]
        found = next(
            (name for name in candidates if room[name] >= need and name not in refused.get(fragment, ())), None
        )
        if found is None:
            lacking[fragment] = need
        else:
            chosen[fragment] = found
            room[found] -= need
    return chosen, "all other workers leave" if alone else _without(lacking)


def _other_machines_first(host: str, candidates: Sequence[str], live: Mapping[str, Member]) -> list[str]:
    """The candidates in their order, but those that a power cut would take together with the host come later."""
    machine = live[host].device.machine if host in live else ""
    return sorted(candidates, key=lambda name: machine != "" and live[name].device.machine == machine)


def _near_first(host: str, candidates: Sequence[str], links: Links) -> list[str]:
    """The candidates in their order, but those after which a snapshot takes clearly longer come later."""
    seconds = {name: links.transfer(host, name, _PROBE_BYTES) for name in candidates}
    known = [each for each in seconds.values() if each is not None]
    if not known:
        return list(candidates)
    nearest = max(min(known), _NEAR_SECONDS)

    def distance(name: str) -> int:
        # Nobody has measured it: not the first choice, but not one that is known to be bad either.
        found = seconds[name]
        return 1 if found is None else max(0, math.floor(math.log(found / nearest, _FARTHER)))

    return sorted(candidates, key=distance)


def _least_traffic_first(job: Job, plan: Plan, fragment: int, candidates: Sequence[str], links: Links) -> list[str]:
    """The candidates in their order, but those whose links the adopted fragment would hold up come later."""
    found = next((summary for summary in job.fragments if summary.index == fragment), None)
    if found is None or plan.predicted_step_seconds is None:
        return list(candidates)

    def seconds(name: str) -> float:
        counts = Counter[str]()
        for other, count in found.traffic.items():
            if plan.placement[other] not in (name, plan.placement[fragment]):
                counts[plan.placement[other]] += count * job.train.micro_batches
        # Of a link that nobody has measured nothing is known to be bad.
        return sum(links.transfer(name, other, count) or 0.0 for other, count in counts.items())

    each = {name: seconds(name) for name in candidates}
    unnoticed = min(each.values(), default=0.0) + _UNNOTICED * plan.predicted_step_seconds
    return sorted(candidates, key=lambda name: each[name] > unnoticed)


def _without(lacking: dict[int, int]) -> str:
    if not lacking:
        return ""
    which = ", ".join(map(str, lacking))
    snapshots, fragments = (plural(word, len(lacking)) for word in ("snapshot", "fragment"))
    size = format_bytes(sum(lacking.values()))
    return f"no other worker has room for the {snapshots} of {fragments} {which} ({size})"


def spacing(
    every: int | Literal["auto"], pace: float, cost: float, work: float = 0.0, carrying: float | None = None
) -> int:
    """Steps from one common step to the next.

    `pace` is in seconds per step; a round takes `cost` seconds, in which it occupies each worker's processor for `work`
    and, where that is known, the busiest link for `carrying`.
    """
    if every != "auto":
        return every
    if pace <= 0:
        return _MOST_STEPS
    wanted = min(_MOST_STEPS, math.ceil(_MOST_SECONDS / pace))
    # A round that was faster than its links are said to be shows that they are faster.
    links = _SHARE * cost if carrying is None else max(_LINK_SHARE * min(carrying, cost), _LEAST_SHARE * cost)
    affordable = math.ceil(max(links, work / _OVERHEAD, _FEWEST_SECONDS) / pace)
    return max(1, wanted, affordable)


def spread(between: float, carried: float | None) -> float:
    """Seconds over which to spread the snapshots of a round, where rounds are `between` seconds apart; 0: as fast as they go.

    `carried` is what they take on the busiest link by themselves; None: it has not been measured.
    """
    if carried is None or carried < _FELT_SECONDS:
        return 0.0
    seconds = min(_SPREAD * carried, between / _SPREAD_SHARE, _LONGEST_SPREAD)
    return seconds if seconds > carried else 0.0


def _wanted(job: Job, plan: Plan, run: Run, carried: float | None) -> int:
    """Steps to the next round of this job, if its snapshots keep the busiest link for `carried` seconds."""
    every = job.spec.fault_tolerance.backup_every
    wanted = spacing(every, run.pace, run.cost, _work(job, plan), carried)
    # One round that took long, as the first ones do, must not put the next one off for long.
    return min(wanted, _GROWTH * run.spacing) if every == "auto" else wanted


def _work(job: Job, plan: Plan) -> float:
    """Processor seconds that a round takes of each worker, were they all to send and hold alike."""
    return _WORK * sum(_state_bytes(job).values()) / len(plan.workers)


def _state_bytes(job: Job) -> dict[int, int]:
    """Fragment -> the size of a snapshot of it."""
    copies = 1 + optimizer_slots(job.train.optimizer)
    return {summary.index: summary.parameter_bytes * copies for summary in job.fragments}


def carrying(job: Job, plan: Plan, backups: Mapping[int, str], links: Links) -> float | None:
    """Seconds that the snapshots of a round take on the busiest link of a worker, in or out, with nothing else on it.

    None where somebody's link has not been measured.
    """
    seconds = defaultdict[tuple[str, str], float](float)
    for fragment, count in _state_bytes(job).items():
        if (to := backups.get(fragment)) is None:
            continue
        took = links.transfer(plan.placement[fragment], to, count)
        if took is None:
            return None
        seconds[plan.placement[fragment], "out"] += took
        seconds[to, "in"] += took
    return max(seconds.values(), default=0.0)


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
        wanted = _wanted(job, job.plan, run, 0.0)
        if not hurried and run.highest + run.margin < run.common_step + wanted:
            return
        carried = carrying(job, job.plan, run.backups, self._books.links)
        wanted = _wanted(job, job.plan, run, carried)
        due = run.common_step + (1 if hurried else wanted)
        if run.highest + run.margin >= due:
            run.spacing = max(wanted, _MOST_STEPS)
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
        """A snapshot can't be taken or kept; True when that is the end of the round."""
        run, found = job.run, self._of_round(job, message.epoch, message.step)
        if run is None or found is None:
            return False
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
