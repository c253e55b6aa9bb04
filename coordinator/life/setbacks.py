"""Workers that were to join a running job and did not get ready: each is left alone for a while, and tried again. Sans I/O.

The pause and the patience double each time that the same process fails, so a slow download comes to its end one day, and who
never gets ready costs less and less. Nobody else is held up by it.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.life.pool import Member
from coordinator.life.run import Move, Run, Setback

PATIENCE = 60.0
"""Seconds in which a newcomer is to get ready, the first time; while its download comes in, they count from the last sign of that."""
_PAUSE = 60.0
_LONGEST = 1800.0
_GROWTH = 2**20
"""Bytes more that a process holds are a sign that its download comes in."""


def bar(run: Run, member: Member, now: float, *, slow: bool) -> float:
    """Leave a worker alone for a while; returns for how many seconds."""
    before = times(run, member)
    pause = _grown(_PAUSE, before)
    run.setbacks[member.name] = Setback(incarnation=member.incarnation, times=before + 1, until=now + pause, slow=slow)
    return pause


def set_back(run: Run, now: float) -> None:
    """The clock was: nobody is left alone for longer than was said."""
    for setback in run.setbacks.values():
        if setback.until is not None:
            setback.until = min(setback.until, now + _grown(_PAUSE, setback.times - 1))


def barred(run: Run, member: Member) -> bool:
    """Whether a worker is to be left alone."""
    setback = _of(run, member)
    return setback is not None and setback.until is not None


def lift_due(run: Run, now: float) -> list[str]:
    """Those whose pause is over; each once."""
    due = [name for name, setback in run.setbacks.items() if setback.until is not None and now >= setback.until]
    for name in due:
        run.setbacks[name].until = None
    return due


def lift_all(run: Run) -> None:
    """Everybody may be tried again."""
    for setback in run.setbacks.values():
        setback.until = None


def lift_late(run: Run, member: Member) -> bool:
    """A worker was ready after all, only too late: it may be tried again at once. Whether that is news."""
    setback = _of(run, member)
    if setback is None or setback.until is None or not setback.slow:
        return False
    setback.until = None
    return True


def forget(run: Run, names: Iterable[str]) -> None:
    """These have got ready."""
    for name in names:
        run.setbacks.pop(name, None)


def times(run: Run, member: Member) -> int:
    """How often in a row it has not got ready."""
    setback = _of(run, member)
    return setback.times if setback is not None else 0


def note_growth(move: Move, newcomers: Iterable[Member], now: float) -> None:
    """Notice when a newcomer holds more than it did."""
    for member in newcomers:
        if member.name in move.unready and member.memory_used_bytes >= move.memory.get(member.name, 0) + _GROWTH:
            move.memory[member.name], move.grew_at = member.memory_used_bytes, now


def overdue(run: Run, move: Move, newcomers: Iterable[Member], now: float) -> bool:
    """Whether a move has waited long enough for its newcomers."""
    patience = _grown(PATIENCE, max((times(run, member) for member in newcomers), default=0))
    return now - max(move.since, move.grew_at) > patience or now - move.since > _LONGEST


def _of(run: Run, member: Member) -> Setback | None:
    setback = run.setbacks.get(member.name)
    return setback if setback is not None and setback.incarnation == member.incarnation else None


def _grown(seconds: float, doublings: int) -> float:
    return min(seconds * 2.0 ** min(doublings, 10), _LONGEST)
