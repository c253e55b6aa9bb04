"""The sans-I/O bookkeeping: replay log, inbox, patience."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from executor.ordering import Task, TaskKind
from fusion.messages import TrainConfig
from fusion.spec import LrScheduleSpec, OptimizerSpec
from fusion.wire import FrameKind, Header
from worker.protocol.accounts import Accounts
from worker.protocol.inbox import Inbox
from worker.protocol.replay_log import Key, ReplayLog
from worker.protocol.waiting import Patience

TRAIN = TrainConfig(
    steps=9,
    micro_batches=2,
    micro_batch_size=1,
    seed=0,
    optimizer=OptimizerSpec(),
    lr_schedule=LrScheduleSpec(),
    eval_batches=2,
)


def key(step: int, micro_batch: int = 0, kind: FrameKind = FrameKind.ACTIVATION) -> Key:
    return (kind, 1, step, micro_batch)


@dataclass(frozen=True)
class Text:
    text: str

    @property
    def nbytes(self) -> int:
        return len(self.text)


def header(step: int, edge: int = 1) -> Header:
    return Header("job", 0, FrameKind.ACTIVATION, edge, step, 0)


def test_the_log_finds_by_key_and_forgets_by_step() -> None:
    log: ReplayLog[Text] = ReplayLog()
    for step in (3, 1, 2):
        log.record(header(step), Text(f"a{step}"))
        log.record(header(step, edge=2), Text(f"b{step}"))
    found = log.find((FrameKind.ACTIVATION, 2, 2, 0))
    assert found is not None
    assert found.parcel.text == "b2"
    assert log.find(key(2, kind=FrameKind.GRADIENT)) is None
    assert log.nbytes == 12
    log.forget(1)
    assert log.find(key(1)) is None
    assert [sent.parcel.text for sent in log] == ["a2", "b2", "a3", "b3"]
    log.forget(3)
    assert len(log) == 0
    log.record(header(2), Text("late"))
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
    assert patience.left() > 3.7  # A few steps: the link is no faster now.
    for _ in range(700):
        patience.arrived()
    assert patience.left() == 2.0
    for _ in range(100):
        patience.asked()
    assert patience.left() == 60.0


def test_a_step_takes_what_passes_between_reports_and_a_replayed_one_is_not_counted() -> None:
    accounts = Accounts("job", TRAIN)

    def took(step: int, now: float) -> float | None:
        return accounts.step_report(0, step, (), {}, 0, 0, now).seconds

    assert took(4, 10.0) is None
    assert took(5, 10.5) == 0.5
    assert took(4, 12.0) is None
    assert took(5, 12.1) is None
    assert took(6, 12.5) == 2.0
    assert took(8, 13.0) is None


def test_what_a_fragment_had_told_of_its_step_goes_with_it() -> None:
    accounts = Accounts("job", TRAIN)
    accounts.lost(1, 3, 5.0)
    accounts.evaluated(0, 1, 2, 7.0)
    accounts.forget({1})
    assert accounts.step_report(0, 3, (), {}, 0, 0, 0.0).loss is None
    accounts.spent(Task(TaskKind.FORWARD, 1, 3, 0), 0.1)
    for loss in (1.0, 3.0):
        accounts.lost(1, 3, loss)
    assert accounts.step_report(0, 3, (1,), {}, 0, 0, 0.0).loss == 2.0
    accounts.evaluated(0, 1, 2, 1.0)
    report = accounts.evaluated(0, 1, 2, 2.0)
    assert report is not None
    assert report.loss == 1.5
