"""What the system tests share: a pool of real processes, and whether links can be shaped here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.shaping import unavailable
from fusion.local import LocalPool, LocalWorker


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPool]:
    """A coordinator and four workers, one thread each."""
    folder: Path = tmp_path_factory.mktemp("pool")
    with LocalPool(folder, [LocalWorker(f"w{index}") for index in range(4)], dashboard=False) as running:
        running.wait_for_workers()
        yield running


@pytest.fixture(scope="session")
def shaped_links() -> None:
    """Asked of the machine by the tests that need it: the answer takes making a network."""
    if (reason := unavailable()) is not None:
        pytest.skip(reason)
