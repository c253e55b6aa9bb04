"""Snapshots between workers: what a backup worker keeps, and until when."""

from __future__ import annotations

import queue
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest
import torch

from fusion.errors import BlobError
from fusion.messages import BackupFailed, Holding
from fusion.wire import Header
from worker.jobs.backups import Backups
from worker.protocol.pieces import LARGEST, piece_bytes

FRAGMENT = SimpleNamespace(parameters=(), written_buffers=(), inputs=(), outputs=())
MEMORY = SimpleNamespace(limit=2**30, used=lambda: 0)


class Pair:
    """A host and the backup worker of its fragment, with nothing between them."""

    def __init__(self) -> None:
        self.reports: queue.Queue[Any] = queue.Queue()
        self.waits: queue.Queue[tuple[float, Callable[[], None]]] = queue.Queue()
        """What the backup worker is to do later."""
        self.errors: queue.Queue[Exception] = queue.Queue()
        self.host = self._make("host", "backup")
        self.backup = self._make("backup", "host")

    def _make(self, name: str, other: str) -> Backups:
        def transmit(to: str, header: Header, payload: memoryview | None) -> None:
            value = None if payload is None else torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            getattr(self, to).handle(header, name, value)

        return Backups(
            "job",
            None,  # type: ignore[arg-type]
            (FRAGMENT,),  # type: ignore[arg-type]
            MEMORY,  # type: ignore[arg-type]
            transmit,
            self.reports.put,
            lambda: 0,
            self._later,
            self.errors.put,
        )

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self.waits.put((seconds, call))

    def snapshot(self, step: int) -> None:
        """Take one and wait until it is held."""
        self.host.offer(0, step, "backup", {"parameter/weight": torch.full((4,), float(step))})
        report = self.reports.get(timeout=30)
        assert isinstance(report, Holding)
        assert report.step == step

    def held(self, step: int) -> float:
        return self.backup.state(0, step)["parameter/weight"][0].item()

    def close(self) -> None:
        self.host.close()
        self.backup.close()


def test_the_common_snapshot_stays_although_its_holder_missed_that_it_is_common() -> None:
    pair = Pair()
    pair.snapshot(3)
    pair.host.commit(3)
    for step in (6, 8, 10):  # Rounds that come to nothing.
        pair.snapshot(step)
    assert pair.held(3) == 3.0
    assert pair.held(10) == 10.0
    with pytest.raises(BlobError):
        pair.held(8)
    pair.close()


def test_who_gives_a_fragment_away_keeps_its_snapshot_until_there_is_a_newer_one() -> None:
    pair = Pair()
    pair.snapshot(3)
    pair.host.keep(0, 3)
    pair.host.commit(3)
    pair.host.commit(3)
    assert pair.host.state(0, 3)["parameter/weight"][0].item() == 3.0
    pair.host.commit(5)
    with pytest.raises(BlobError):
        pair.host.state(0, 3)
    pair.close()


def test_a_newer_common_snapshot_takes_the_place_of_the_older() -> None:
    pair = Pair()
    pair.snapshot(3)
    pair.snapshot(5)
    pair.backup.commit(5)
    assert pair.held(5) == 5.0
    with pytest.raises(BlobError):
        pair.held(3)
    pair.close()


def test_a_round_that_another_plan_has_made_void_takes_no_more_of_the_links() -> None:
    pair = Pair()
    pair.backup._limits = [2**24]
    pair.snapshot(3)
    for each in (pair.host, pair.backup):
        each.commit(3)
    transmit = pair.host._transmit
    sent: list[int] = []

    def lose_piece_2_once(to: str, header: Header, payload: memoryview | None) -> None:
        sent.append(header.micro_batch)
        if header.micro_batch != 2 or sent.count(2) > 1:
            transmit(to, header, payload)

    pair.host._transmit = lose_piece_2_once
    pair.host.offer(0, 6, "backup", {"parameter/weight": torch.zeros(LARGEST)})
    pair.host._hasher.submit(lambda: None).result(timeout=30)
    assert sorted(sent) == [0, 1, 2, 3, 4, 5]
    pair.backup.abandon(3)
    pair.backup._want("host", 0, 6, 2)  # It was on its way: the snapshot would be whole now.
    pair.backup._hasher.submit(lambda: None).result(timeout=30)
    assert pair.reports.empty()
    pair.host.abandon(3)
    pair.backup._want("host", 0, 6, 2)
    pair.host.poke()
    assert sent[6:] == [2]
    assert pair.held(3) == 3.0
    pair.snapshot(7)
    assert pair.held(7) == 7.0
    pair.close()


def test_a_spread_snapshot_is_asked_for_over_the_time_that_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("worker.jobs.backups.monotonic", lambda: clock[0])
    pair = Pair()
    pair.backup._limits = [2**24]
    pair.host.spread(2.0)
    weight = torch.rand(300_000)
    pair.host.offer(0, 3, "backup", {"parameter/weight": weight})
    asked = 1
    while True:
        seconds, call = pair.waits.get(timeout=30)
        clock[0] += seconds
        call()
        asked += 1
        if asked == -(-(weight.nbytes + 8) // piece_bytes(weight.nbytes + 8, 2.0)):
            break
    report = pair.reports.get(timeout=30)
    assert isinstance(report, Holding)
    assert 1.5 < clock[0] - 100.0 <= 2.0
    assert torch.equal(pair.backup.state(0, 3)["parameter/weight"], weight)
    assert pair.waits.empty()
    pair.close()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, "soon", None, 3])
def test_an_announcement_with_no_proper_time_is_refused(seconds: object) -> None:
    pair = Pair()
    header = pair.host._header(0, 3, 0, 1)
    announcement = torch.frombuffer(bytearray(msgpack.packb([1000, 1, 0, seconds])), dtype=torch.uint8)
    pair.backup.handle(header, "host", announcement)
    report = pair.reports.get(timeout=30)
    assert isinstance(report, BackupFailed)
    assert report.cause == "corrupt"
    pair.close()


def test_a_snapshot_that_can_not_be_announced_is_told() -> None:
    pair = Pair()
    pair.host.offer(0, 3, "backup", {"parameter/weight": torch.zeros(1, dtype=torch.complex128)})
    assert isinstance(pair.errors.get(timeout=30), KeyError)
    pair.snapshot(4)
    pair.close()


def test_a_last_piece_that_comes_while_the_job_is_dropped_is_let_go() -> None:
    pair = Pair()
    held_back: list[tuple[Header, memoryview]] = []
    transmit, shutdown = pair.host._transmit, pair.backup._hasher.shutdown

    def keep_pieces(to: str, header: Header, payload: memoryview | None) -> None:
        if header.micro_batch == 0 or payload is None:
            transmit(to, header, payload)
        else:
            held_back.append((header, payload))

    def meanwhile(**options: Any) -> None:
        shutdown(wait=False)
        for header, payload in held_back:
            transmit("backup", header, payload)
        shutdown(**options)

    pair.host._transmit = keep_pieces
    pair.backup._hasher.shutdown = meanwhile  # type: ignore[method-assign]
    pair.host.offer(0, 3, "backup", {"parameter/weight": torch.zeros(4)})
    pair.host._hasher.submit(lambda: None).result(timeout=30)
    assert len(held_back) == 1
    pair.close()
    assert pair.reports.empty()
    assert pair.errors.empty()
