"""How much of a snapshot is asked for ahead, on links that are simulated."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

import pytest

from worker.protocol.pull import BLOCK_BYTES, MOST_BLOCKS, Pull


@dataclass
class Course:
    """What came of a transfer."""

    seconds: float
    longest_queue: float
    """Seconds that a message of the training would have waited behind answers, at worst, once the window had settled."""
    messages: int


def transfer(blocks: int, megabits: float, round_trip: float, noise: float = 0.0, pull: Pull | None = None) -> Course:
    """Fetch so many blocks over a link that carries one answer after the other; `noise` is how late some come, in seconds."""
    pull, chance = pull or Pull(), random.Random(0)
    block_seconds = BLOCK_BYTES * 8 / (megabits * 1e6)
    now = free = longest = 0.0
    asked = arrived = messages = 0
    coming: list[tuple[float, int, float]] = []
    while arrived < blocks:
        while asked < blocks and (count := min(pull.blocks(asked - arrived), blocks - asked)):
            begin = max(now + round_trip / 2, free)
            free = begin + count * block_seconds
            if arrived > blocks / 2:
                longest = max(longest, free - now - round_trip / 2)
            late = noise if chance.random() < 0.3 else 0.0
            heapq.heappush(coming, (free + round_trip / 2 + late, count, now))
            asked += count
            messages += 1
        now, count, asked_at = heapq.heappop(coming)
        arrived += count
        pull.came(count, now - asked_at)
    return Course(now, longest, messages)


@pytest.mark.parametrize(("megabits", "round_trip"), [(5, 0.001), (20, 0.001), (20, 0.04), (100, 0.001), (100, 0.04)])
def test_a_link_is_used_and_little_waits_on_it(megabits: float, round_trip: float) -> None:
    blocks = 2000
    course = transfer(blocks, megabits, round_trip)
    alone = blocks * BLOCK_BYTES * 8 / (megabits * 1e6)
    assert course.seconds < 1.6 * alone
    assert course.longest_queue < max(0.03, 2.5 * alone / blocks)


def test_on_a_fast_link_few_messages_do() -> None:
    pull = Pull()
    transfer(500, 10_000, 0.0005, pull=pull)
    again = transfer(512, 10_000, 0.0005, pull=pull)
    assert again.messages == 512 / MOST_BLOCKS


def test_answers_that_are_late_by_chance_are_no_queue() -> None:
    assert transfer(5000, 10_000, 0.0005, noise=0.02).messages < 1.5 * 5000 / MOST_BLOCKS


def test_something_is_always_under_way() -> None:
    pull = Pull()
    for _ in range(100):
        pull.came(1, 0.001)
    windows = []
    for _ in range(1000):
        pull.came(1, 5.0)
        windows.append(pull.window)
        assert pull.blocks(0) >= 1
    assert min(windows) == 1
    # They come no faster: that is how long the way is now.
    assert windows[-1] > 1
