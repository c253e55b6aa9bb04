"""One pool of real processes, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fusion.local import LocalPool, LocalWorker


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalPool]:
    """A coordinator and four workers, one thread each."""
    folder: Path = tmp_path_factory.mktemp("pool")
    with LocalPool(folder, [LocalWorker(f"w{index}") for index in range(4)], dashboard=False) as running:
        running.wait_for_workers()
        yield running
