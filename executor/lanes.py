"""Threads that each compute with as many cores as a worker's one compute thread does, so that the bits are the same.

torch keeps the number of threads of an operator for each thread that calls operators, and runs a backward on the CPU in the
thread that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Lanes:
    """`count` threads, started when they are first used; `threads` of torch's for each."""

    def __init__(self, count: int, threads: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "lane", initializer=torch.set_num_threads, initargs=(threads,))

    def run(self, calls: Sequence[Callable[[], Result]]) -> list[Result]:
        """Make the calls, as many at the same time as there are lanes; their results in order.

        Raises what the first of them raises, when all have ended.
        """
        futures = [self._pool.submit(call) for call in calls]
        for future in futures:
            future.exception()
        return [future.result() for future in futures]

    def close(self) -> None:
        """Let the threads end after what they are at."""
        self._pool.shutdown(wait=False)
