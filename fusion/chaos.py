"""`fusion up --chaos`: kills workers of the pool at random while it trains, and starts them again, to show what follows."""

from __future__ import annotations

import random
from collections.abc import Callable

from fusion.client import StreamItem
from fusion.local import LocalPool, LocalWorker


class Chaos:
    """Sees every item of the job's stream. One worker at a time is killed with `kill -9`, never the last one.

    The first dies after a tenth of the steps or so, then about one every sixth of them; each comes back some steps later.
    """

    def __init__(self, pool: LocalPool, steps: int, say: Callable[[str], None], seed: int | None = None) -> None:
        self._pool = pool
        self._steps = steps
        self._say = say
        self._random = random.Random(seed)
        self._alive = {worker.name: worker for worker in pool.workers}
        self._gone: LocalWorker | None = None
        self._next = max(2, round(steps * self._random.uniform(0.08, 0.15)))

    def heard(self, item: StreamItem) -> None:
        """Another step may be done: time to kill, or to bring back."""
        if item.kind != "metrics" or int(item.data["step"]) < self._next:
            return
        step = int(item.data["step"])
        if self._gone is not None:
            back, self._gone = self._gone, None
            self._say(f"chaos: {back.name} is started again")
            self._pool.start_worker(back)
            self._alive[back.name] = back
            self._next = step + max(2, round(self._steps * self._random.uniform(0.08, 0.16)))
        elif len(self._alive) > 1 and step < 0.9 * self._steps:
            victim = self._random.choice(sorted(self._alive))
            self._gone = self._alive.pop(victim)
            self._say(f"chaos: kill -9 {victim} after step {step}")
            self._pool.kill(victim)
            self._next = step + max(2, round(self._steps * self._random.uniform(0.04, 0.08)))
