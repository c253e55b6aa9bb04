"""The pools that the benchmarks of slow networks act out, as topology files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import yaml

from fusion.topology import Topology

NOMINAL = 4e10
"""FLOP/s of the workers that are not said to be slower; `fusion up` looks at relations only."""
REFERENCE = "reference"


def two_cities(megabits: float, milliseconds: float = 20.0) -> Topology:
    """Two workers in each city, tied by 1 Gbit/s and 1 ms; between the cities it is slow."""
    workers = [(name, name[0], 1.0) for name in ("a-1", "a-2", "b-1", "b-2")]
    return _topology(
        workers,
        [
            ("a", "a", 1000.0, 1.0),
            ("b", "b", 1000.0, 1.0),
            ("a", "b", megabits, milliseconds),
        ],
    )


def fast() -> Topology:
    """The two cities moved together: 1 Gbit/s and 1 ms between all workers."""
    return two_cities(1000.0, 1.0)


def home_devices(count: int = 4) -> Topology:
    """Machines at home, 1 to 4 times apart, with uplinks from 8 to 100 Mbit/s: a pair has the slower one's."""
    uplinks = dict(
        list({"h-1": 100.0, "h-2": 50.0, "h-3": 20.0, "h-4": 8.0, "h-5": 100.0, "h-6": 20.0}.items())[:count]
    )
    speeds = (1.0, 0.75, 0.5, 0.25, 0.5, 1.0)
    workers = [(name, name, speed) for name, speed in zip(uplinks, speeds, strict=False)]
    links = [
        (first, second, min(uplinks[first], uplinks[second]), 15.0)
        for number, first in enumerate(uplinks)
        for second in list(uplinks)[number + 1 :]
    ]
    return _topology(workers, links)


def one_bad_link(megabits: float = 8.0) -> Topology:
    """Four workers with 1 Gbit/s and 1 ms, but for one pair."""
    workers = [(f"w-{number}", "office", 1.0) for number in range(1, 5)]
    return _topology(workers, [("office", "office", 1000.0, 1.0), ("w-2", "w-3", megabits, 50.0)])


def alike(workers: Sequence[str], megabits: float) -> Topology:
    """Workers of one speed, each behind a link of its own of this rate, as `shaping.py` makes them."""
    links = [(first, second, megabits, 0.1) for first, second in combinations(workers, 2)]
    return _topology([(name, name, 1.0) for name in workers], links)


def slower(topology: Topology, times: float) -> Topology:
    """The same with a worker that is not to be started: beside it all others are that many times slower.

    So that several of them fit on a few cores, each as fast as it would be on a core of its own, only slower.
    """
    workers = [worker.model_dump() for worker in topology.workers]
    fastest = max(worker["speed"] for worker in workers)
    workers.append({"name": REFERENCE, "region": REFERENCE, "speed": times * fastest, "memory": "64GiB"})
    links = [link.model_dump() for link in topology.links]
    regions = {worker.region for worker in topology.workers}
    links += [{"between": [REFERENCE, region], "bandwidth": "1Gbit/s", "latency": 0} for region in sorted(regions)]
    return Topology.model_validate({"workers": workers, "links": links})


def slow_motion(topology: Topology, times: float) -> Topology:
    """The same with everything that many times slower, workers, rates and delays: a step takes that many times as long."""
    links = [
        link.model_dump() | {"bandwidth": link.bandwidth / times, "latency": link.latency * times}
        for link in topology.links
    ]
    return slower(Topology.model_validate({**topology.model_dump(), "links": links}), times)


def names(topology: Topology) -> list[str]:
    """The workers to start."""
    return [worker.name for worker in topology.workers if worker.name != REFERENCE]


def write(topology: Topology, path: Path) -> Path:
    """The topology as a file."""
    path.write_text(yaml.safe_dump(topology.model_dump(mode="json")), encoding="utf-8")
    return path


def _topology(workers: list[tuple[str, str, float]], links: list[tuple[str, str, float, float]]) -> Topology:
    """Workers as (name, region, relative speed), links as (end, end, Mbit/s, milliseconds one way)."""
    return Topology.model_validate(
        {
            "workers": [
                {"name": name, "region": region, "speed": speed * NOMINAL, "memory": "16GiB"}
                for name, region, speed in workers
            ],
            "links": [
                {"between": [first, second], "bandwidth": f"{megabits}Mbit/s", "latency": f"{milliseconds}ms"}
                for first, second, megabits, milliseconds in links
            ],
        }
    )
