"""Spot checks: before a stretch of steps counts as settled, some of its fragments are run again by other workers.

A stretch lies between two common snapshots. Each of its fragments is drawn with probability `verify.fraction`, after the
work is done and before anybody may forget what was sent, and run again by the worker that holds the snapshot at its
beginning. So `fraction` is the share of the tasks that are run twice. What can't be checked is void, and holds nobody up.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.life import accusations
from coordinator.life.books import Books
from coordinator.life.inspection import Inspection, SpotCheck, Verdict, judge
from coordinator.life.jobs import Job
from coordinator.life.pool import Member
from fusion.messages import Check, CheckVoid, Receipts, Replayed

CheckMessage = Receipts | Replayed | CheckVoid

_PATIENCE = 30.0
"""Seconds for a check; and so many times what its steps took the first time:"""
_SLOWER = 20.0

GoBack = Callable[[Job, Member | None, float, str], None]
"""(job, worker, now, why): have the worker leave the pool for good, if one is named, and the job go back to its checkpoint."""


class SpotChecks:
    """Of all jobs. `draw` gives numbers in 0 .. 1 that nobody else can foresee."""

    def __init__(self, books: Books, draw: Callable[[], float], go_back: GoBack) -> None:
        self._books = books
        self._draw = draw
        self._go_back = go_back

    def settled(self, job: Job, now: float, through: int) -> bool:
        """Whether everything up to `through` may count now: it was not drawn, or has passed, or can't be checked."""
        run = job.run
        assert run is not None
        if not job.spec.verify.fraction or run.settled >= through:
            return True
        inspection = run.inspection
        if inspection is None or (inspection.epoch, inspection.through) != (job.epoch, through):
            inspection = run.inspection = self._open(job, now, through)
        self._give_up_some(job, inspection, now)
        verdicts: list[tuple[SpotCheck, Verdict]] = []
        for check in inspection.checks:
            verdict = self._judge(job, inspection, check)
            if verdict is None:
                return False
            verdicts.append((check, verdict))
        job.checks_passed += sum(verdict.kind == "passed" for _, verdict in verdicts)
        failed = [(check, verdict) for check, verdict in verdicts if verdict.kind == "failed"]
        if failed:
            self._fail(job, now, failed)
            return False
        run.inspection, run.settled = None, through
        return True

    def heard(self, job: Job, member: Member, message: CheckMessage) -> None:
        """Take in what a worker says of a check."""
        inspection = job.run.inspection if job.run is not None else None
        if inspection is None or (message.epoch, message.through) != (inspection.epoch, inspection.through):
            return
        check = next((check for check in inspection.checks if check.fragment == message.fragment), None)
        if check is None:
            return
        match message:
            case Receipts():
                check.receipts.setdefault(member.name, message)
            case Replayed() if member.name == check.checker and check.replayed is None:
                check.replayed = message
            case CheckVoid() if member.name == check.checker:
                check.void = message.message or "its checker gave up"
            case _:
                pass

    # Pieces --------------------------------------------------------------------------------------------------------

    def _open(self, job: Job, now: float, through: int) -> Inspection:
        """Draw what is checked, and order it."""
        run, plan = job.run, job.plan
        assert run is not None
        assert plan is not None
        inspection = Inspection(
            epoch=job.epoch, after=run.common_step, through=through, ordered_at=now, witnesses=list(job.hosts)
        )
        for fragment, host in enumerate(plan.placement):
            if self._draw() >= job.spec.verify.fraction:
                continue
            job.checks_drawn += 1
            found = self._checker(job, fragment, host)
            if found is None:
                continue
            checker, exact = found
            inspection.checks.append(SpotCheck(fragment=fragment, host=host, checker=checker, exact=exact))
            order = Check(
                job=job.id,
                epoch=job.epoch,
                fragment=fragment,
                checker=checker,
                after=run.common_step,
                through=through,
                exact=exact,
            )
            self._books.tell(job, order)
        self._books.save(job, announce=False)
        return inspection

    def _checker(self, job: Job, fragment: int, host: str) -> tuple[str, bool] | None:
        """Who can run it again, and whether its bits must be the same; None when nobody can.

        Under an earlier placement other workers had a part in the stretch, and what they sent may be gone with them.
        """
        run = job.run
        assert run is not None
        if run.since_epoch != job.epoch:
            return None
        known = run.backups if run.common_step == run.start else run.holders
        name = known.get(fragment, "")
        checker, checked = self._books.pool.get(name), self._books.pool.get(host)
        if name == host or name not in job.hosts or checker is None or checked is None:
            return None
        return name, _alike(checker, checked)

    def _give_up_some(self, job: Job, inspection: Inspection, now: float) -> None:
        assert job.run is not None
        patience = _PATIENCE + _SLOWER * job.run.pace * (inspection.through - inspection.after)
        live = {member.name for member in self._books.hosts(job)}
        gone = [name for name in inspection.witnesses if name not in live]
        late = now - inspection.ordered_at > patience
        for check in inspection.checks:
            if (gone or late) and not inspection.decided(check):
                check.void = f"{gone[0]} has left" if gone else f"{check.checker} took too long"

    def _judge(self, job: Job, inspection: Inspection, check: SpotCheck) -> Verdict | None:
        if not inspection.decided(check):
            return None
        within = range(inspection.after + 1, inspection.through + 1)
        parts = {
            step: parts[check.fragment].digest[:32]
            for step, parts in job.parts.items()
            if step in within and check.fragment in parts
        }
        losses = {step: partial.loss for step, partial in job.partial.items() if partial.loss is not None}
        return judge(check, parts, losses)

    def _fail(self, job: Job, now: float, failed: list[tuple[SpotCheck, Verdict]]) -> None:
        """Two say different things of what a fragment makes: find out who is not to be trusted, and go back."""
        job.checks_failed += len(failed)
        failed.sort(key=lambda each: (each[1].step, len(each[1].blamed)))
        for check, verdict in failed:
            self._books.story(
                job,
                "check-failed",
                f"spot check of fragment {check.fragment} at step {verdict.step}: {verdict.words}",
                worker=check.host,
                checker=check.checker,
                fragment=check.fragment,
                step=verdict.step,
            )
        pairs = [
            (check.host, check.checker) if len(verdict.blamed) == 1 else (verdict.blamed[1], verdict.blamed[0])
            for check, verdict in failed
        ]
        liar = accusations.liar(job.accusations, pairs, len(job.hosts))
        job.accusations.extend(pair for pair in pairs if pair not in job.accusations)
        check, verdict = failed[0]
        at = f"of fragment {check.fragment} at step {verdict.step}"
        member = self._books.pool.get(liar) if liar else None
        if member is None:
            names = " and ".join(pairs[0])
            self._go_back(job, None, now, f"{names} disagree in a spot check {at}; others are to check them")
            return
        job.accusations = [pair for pair in job.accusations if liar not in pair]
        self._go_back(job, member, now, f"worker {liar} failed a spot check {at}")


def _alike(one: Member, other: Member) -> bool:
    """Whether the two compute the same bits: the same kernels of the same torch, with as many threads."""
    return one.torch_version == other.torch_version and all(
        getattr(one.device, what) == getattr(other.device, what)
        for what in ("kind", "description", "capability", "threads")
    )
