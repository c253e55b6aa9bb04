"""What a worker of a topology acts: its own links, and how long it rests to be as slow as it should."""

from __future__ import annotations

import threading

import pytest

from fusion.topology import Topology
from worker.transport.slow_links import SlowLink
from worker.transport.surroundings import Surroundings, surroundings

POOL = Topology.model_validate(
    {
        "workers": [
            {"name": "oslo-1", "region": "oslo", "speed": 4e11, "memory": "4GiB"},
            {"name": "oslo-2", "region": "oslo", "speed": 1e11, "memory": "4GiB"},
            {"name": "lima-1", "region": "lima", "speed": 2e11, "memory": "8GiB"},
        ],
        "links": [
            {"between": ["oslo", "oslo"], "bandwidth": "1Gbit/s", "latency": "1ms"},
            {"between": ["oslo", "lima"], "bandwidth": "16Mbit/s", "latency": "90ms"},
        ],
    }
)


def test_links_and_relative_speeds_of_each_worker() -> None:
    first, second, far = (surroundings(POOL, name) for name in ("oslo-1", "oslo-2", "lima-1"))
    assert first.links == {"oslo-2": SlowLink(1.25e8, 0.001), "lima-1": SlowLink(2e6, 0.09)}
    assert far.links == {"oslo-1": SlowLink(2e6, 0.09), "oslo-2": SlowLink(2e6, 0.09)}
    assert (first.slowdown, second.slowdown, far.slowdown) == (1.0, 4.0, 2.0)


def test_a_worker_that_is_not_named_is_as_fast_as_it_is() -> None:
    assert surroundings(POOL, "quito-1") == Surroundings()


@pytest.mark.parametrize(
    ("slowdown", "busy", "elapsed", "rest"),
    [
        (1.0, 2.0, 2.0, 0.0),
        (1.0, 1.0, 2.0, 0.0),
        (4.0, 1.0, 1.0, 3.0),
        # It waited a second for a core: a slower device would still have taken four.
        (4.0, 1.0, 2.0, 2.0),
        (4.0, 1.0, 5.0, 0.0),
    ],
)
def test_the_rest_after_a_task(slowdown: float, busy: float, elapsed: float, rest: float) -> None:
    assert Surroundings(slowdown=slowdown).rest(busy, elapsed) == rest


def test_a_worker_that_is_slower_than_any_clock_rests_as_long_as_a_wait_can_be() -> None:
    assert Surroundings(slowdown=1e30).rest(1.0, 1.0) == threading.TIMEOUT_MAX
