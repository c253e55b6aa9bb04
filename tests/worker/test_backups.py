"""Snapshots between workers: what a backup worker keeps, and until when."""

from __future__ import annotations

import queue
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.errors import BlobError
from fusion.messages import Holding
from fusion.wire import FrameKind, Header
from worker.jobs import backups
from worker.jobs.backups import Backups
from worker.protocol.pull import BLOCK_BYTES, MOST_BLOCKS

FRAGMENT = SimpleNamespace(parameters=(0,), written_buffers=(), inputs=(), outputs=())
DAG = SimpleNamespace(ops=[SimpleNamespace(output_bytes=2**20)])
MEMORY = SimpleNamespace(limit=2**30, used=lambda: 0)


class Pair:
    """A host and the backup worker of its fragment, with nothing between them."""

    def __init__(self) -> None:
        self.reports: queue.Queue[Any] = queue.Queue()
        self.sent: Counter[FrameKind] = Counter()
        self.lose: Callable[[Header], bool] = lambda header: False
        self.host = self._make("host", "backup")
        self.backup = self._make("backup", "host")

    def _make(self, name: str, other: str) -> Backups:
        def transmit(to: str, header: Header, payload: memoryview | None) -> None:
            self.sent[header.kind] += 1
            if self.lose(header):
                return
            value = None if payload is None else torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            getattr(self, to).handle(header, name, value)

        return Backups("job", DAG, (FRAGMENT,), MEMORY, transmit, self.reports.put, lambda: 0)  # type: ignore[arg-type]

    def snapshot(self, step: int, weight: Tensor | None = None) -> None:
        """Take one and wait until it is held."""
        self.host.offer(
            0, step, "backup", {"parameter/weight": torch.full((4,), float(step)) if weight is None else weight}
        )
        self.wait(step)

    def wait(self, step: int) -> None:
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


@pytest.mark.parametrize(("values", "pieces"), [(10, 1), (3 * BLOCK_BYTES // 4, 4), (100 * BLOCK_BYTES // 4 + 17, 50)])
def test_a_snapshot_comes_over_in_pieces_that_grow(values: int, pieces: int) -> None:
    """A header comes before the values."""
    pair, weight = Pair(), torch.arange(values, dtype=torch.float32)
    pair.snapshot(3, weight)
    assert pair.backup.state(0, 3)["parameter/weight"].equal(weight)
    assert 4 * values / (BLOCK_BYTES * MOST_BLOCKS) < pair.sent[FrameKind.SNAPSHOT_WANT] <= pieces
    pair.close()


def test_pieces_that_are_lost_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(backups, "monotonic", lambda: now)
    pair, weight = Pair(), torch.arange(30 * BLOCK_BYTES // 4, dtype=torch.float32)
    lost: list[Header] = []

    def lose(header: Header) -> bool:
        again = any(header.key == other.key for other in lost)
        if header.kind is FrameKind.SNAPSHOT and header.micro_batch > 0 and not again:
            lost.append(header)
            return True
        return False

    pair.lose = lose
    pair.host.offer(0, 3, "backup", {"parameter/weight": weight})
    while pair.reports.empty():  # What is lost of one window is asked for before the next one.
        now += 3.0
        pair.backup.poke()
    pair.wait(3)
    assert pair.backup.state(0, 3)["parameter/weight"].equal(weight)
    assert len(lost) > 1
    pair.close()
