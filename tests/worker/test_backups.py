"""Snapshots between workers: what a backup worker keeps, and until when."""

from __future__ import annotations

import queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusion.errors import BlobError
from fusion.messages import Holding
from fusion.wire import Header
from worker.jobs.backups import Backups

FRAGMENT = SimpleNamespace(parameters=(), written_buffers=(), inputs=(), outputs=())
MEMORY = SimpleNamespace(limit=2**30, used=lambda: 0)


class Pair:
    """A host and the backup worker of its fragment, with nothing between them."""

    def __init__(self) -> None:
        self.reports: queue.Queue[Any] = queue.Queue()
        self.host = self._make("host", "backup")
        self.backup = self._make("backup", "host")

    def _make(self, name: str, other: str) -> Backups:
        def transmit(to: str, header: Header, payload: memoryview | None) -> None:
            value = None if payload is None else torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            getattr(self, to).handle(header, name, value)

        return Backups("job", None, (FRAGMENT,), MEMORY, transmit, self.reports.put, lambda: 0)  # type: ignore[arg-type]

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
