"""What `fusion up --chaos` does to a pool, without one."""

from __future__ import annotations

from typing import Any, cast

from fusion.chaos import Chaos
from fusion.client import StreamItem
from fusion.local import LocalPool, LocalWorker


class Pool:
    """Notes who lives."""

    def __init__(self, count: int) -> None:
        self.workers = tuple(LocalWorker(f"w{index}") for index in range(count))
        self.alive = {worker.name for worker in self.workers}
        self.killed: list[str] = []
        self.least = count

    def kill(self, name: str) -> None:
        self.alive.remove(name)
        self.killed.append(name)
        self.least = min(self.least, len(self.alive))

    def start_worker(self, worker: LocalWorker) -> None:
        assert worker.name not in self.alive
        self.alive.add(worker.name)


def play(pool: Pool, seed: int) -> list[str]:
    said: list[str] = []
    chaos = Chaos(cast("LocalPool", pool), 200, said.append, seed)
    for step in range(1, 201):
        chaos.heard(StreamItem("metrics", {"step": step}))
        chaos.heard(StreamItem("event", cast("dict[str, Any]", {"event": "x"})))
    return said


def test_workers_die_one_at_a_time_and_come_back() -> None:
    for seed in range(30):
        pool = Pool(4)
        said = play(pool, seed)
        assert len(pool.killed) >= 3
        assert pool.least == 3
        assert said[0].startswith("chaos: kill -9 w")
        assert said[1].endswith("is started again")


def test_the_last_worker_is_left_alone() -> None:
    pool = Pool(1)
    assert play(pool, 0) == []
    assert pool.killed == []
