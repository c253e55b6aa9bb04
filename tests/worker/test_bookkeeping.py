"""The sans-I/O bookkeeping: replay log, inbox, patience."""

from __future__ import annotations

import pytest

from fusion.wire import FrameKind
from worker.inbox import Inbox
from worker.replay_log import Key, ReplayLog, Sent
from worker.waiting import Patience


def key(step: int, micro_batch: int = 0, kind: FrameKind = FrameKind.ACTIVATION) -> Key:
    return (kind, 1, step, micro_batch)


def test_the_log_answers_per_peer_and_forgets_by_step() -> None:
    log: ReplayLog[str] = ReplayLog()
    for step in (1, 2, 3):
        log.record(key(step), Sent("a", b"", f"a{step}"))
        log.record(key(step), Sent("b", b"", f"b{step}"))
    found = log.find("b", key(2))
    assert found is not None
    assert found.payload == "b2"
    assert log.find("c", key(2)) is None
    assert log.find("a", key(2, kind=FrameKind.GRADIENT)) is None
    log.forget(1)
    assert log.find("a", key(1)) is None
    assert [sent.payload for sent in log] == ["a2", "b2", "a3", "b3"]
    log.forget(3)
    assert len(log) == 0
    log.record(key(2), Sent("a", b"", "late"))
    assert len(log) == 0


def test_the_inbox_gives_and_takes_and_closes_steps() -> None:
    inbox: Inbox[str] = Inbox()
    inbox.put(key(1), "one")
    inbox.put(key(2), "two")
    with pytest.raises(ValueError, match="here already"):
        inbox.put(key(2), "again")
    assert inbox.get(key(2)) == "two"
    assert inbox.take(key(1)) == "one"
    with pytest.raises(KeyError):
        inbox.take(key(1))
    inbox.put(key(3), "three")
    inbox.close(2)
    assert len(inbox) == 1
    assert key(3) in inbox
    assert key(2) not in inbox


def test_patience_asks_later_and_later_and_tells_a_person_once() -> None:
    patience = Patience(failure_timeout=4.0)
    assert patience.left() == 2.0
    assert [patience.asked() for _ in range(5)] == [None, None, None, 2.0 + 3.0 + 4.5 + 6.75, None]
    assert patience.left() == 2.0 * 1.5**5
    patience.arrived()
    assert patience.left() == 2.0


def test_patience_learns_from_duplicates_that_a_link_is_slow() -> None:
    patience = Patience(failure_timeout=4.0)
    patience.duplicated()
    assert patience.left() == 2.0
    patience.asked()
    patience.arrived()
    patience.duplicated()
    patience.duplicated()
    assert 3.9 < patience.left() <= 4.0
    for _ in range(50):
        patience.arrived()
    assert patience.left() == 2.0
    for _ in range(100):
        patience.asked()
    assert patience.left() == 60.0
