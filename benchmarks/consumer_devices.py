"""Writes a topology of consumer devices at home, spread over cities: `examples/paper_scale/thousand_devices.yaml`.

    .venv/bin/python benchmarks/consumer_devices.py > examples/paper_scale/thousand_devices.yaml

Public figures, and chance with a fixed seed for who lives where with what.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations_with_replacement
from random import Random

TRAINING_SHARE = 0.57
"""Of the peak speed; `scheduler.devices.TRAINING_SHARE`."""
GLASS = 200_000.0
"""Kilometres per second of light in a fibre."""
DETOUR = 1.5
"""Length of cables over the great circle."""
LAST_MILE = 0.005
"""Seconds one way between a home and its city's exchange, both ends together 10 ms: median pings of fixed lines are like that."""
EARTH = 6371.0


@dataclass(frozen=True)
class Gpu:
    """Peak FP32 speed, memory and its bandwidth from the vendor's architecture papers (Turing, Ampere GA102, Ada)."""

    name: str
    teraflops: float
    gibibytes: int
    gigabytes_per_second: int
    share: int
    """Of the pool, in percent: our choice, mid-range cards being the most common."""


GPUS = (
    Gpu("rtx-2080-ti", 13.4, 11, 616, 10),
    Gpu("rtx-3060", 12.7, 12, 360, 30),
    Gpu("rtx-3070", 20.3, 8, 448, 20),
    Gpu("rtx-3090", 35.6, 24, 936, 10),
    Gpu("rtx-4060", 15.1, 8, 272, 20),
    Gpu("rtx-4090", 82.6, 24, 1008, 10),
)
ACCESS = ((8, 20), (20, 40), (40, 20), (100, 20))
"""Mbit/s upstream and how many of 100 homes have it: slow DSL; cable and 5G (20 is the FCC's broadband benchmark of 2024, and
Ookla's median over 5G in 2021 was 21); vectored VDSL; fibre."""
CITIES = (
    ("london", 51.51, -0.13),
    ("berlin", 52.52, 13.40),
    ("madrid", 40.42, -3.70),
    ("new-york", 40.71, -74.01),
    ("chicago", 41.88, -87.63),
    ("los-angeles", 34.05, -118.24),
    ("sao-paulo", -23.55, -46.63),
    ("tokyo", 35.68, 139.69),
    ("seoul", 37.57, 126.98),
    ("hong-kong", 22.32, 114.17),
    ("singapore", 1.35, 103.82),
    ("sydney", -33.87, 151.21),
)
BACKBONE = "1Gbit/s"
"""What a city's exchange gives one connection; homes have less, so their own connections decide."""


def kilometres(first: tuple[float, float], second: tuple[float, float]) -> float:
    """The great circle between two points (degrees of latitude and longitude)."""
    (north, east), (other_north, other_east) = [(math.radians(a), math.radians(b)) for a, b in (first, second)]
    squared = (
        math.sin((other_north - north) / 2) ** 2
        + math.cos(north) * math.cos(other_north) * math.sin((other_east - east) / 2) ** 2
    )
    return 2 * EARTH * math.asin(math.sqrt(squared))


def topology(devices: int, seed: int) -> str:
    """The topology file."""
    chance = Random(seed)
    homes: Counter[tuple[str, Gpu, int]] = Counter()
    for _ in range(devices):
        city = chance.choice(CITIES)[0]
        (gpu,) = chance.choices(GPUS, [gpu.share for gpu in GPUS])
        ((access, _),) = chance.choices(ACCESS, [homes_of_100 for _, homes_of_100 in ACCESS])
        homes[city, gpu, access] += 1
    lines = [
        f"# {devices} consumer devices in {len(CITIES)} cities, written by benchmarks/consumer_devices.py (seed {seed}).",
        "# The sources of speeds, memories, connections and latencies are named there.",
        "workers:",
    ]
    for (city, gpu, access), count in sorted(homes.items(), key=lambda item: (item[0][0], item[0][1].name, item[0][2])):
        lines.append(
            f"  - {{name: {city}-{gpu.name}-{access}, count: {count}, region: {city}, "
            f"speed: {gpu.teraflops * TRAINING_SHARE * 1e12:.3e}, memory: {gpu.gibibytes - 1}GiB, "
            f"memory_bandwidth: {gpu.gigabytes_per_second}GB/s, access: {access}Mbit/s}}"
        )
    lines.append("links:")
    lived_in = [city for city in CITIES if any(home[0] == city[0] for home in homes)]
    for (first, *here), (second, *there) in combinations_with_replacement(lived_in, 2):
        apart = kilometres((here[0], here[1]), (there[0], there[1]))
        milliseconds = 1000 * (2 * LAST_MILE + DETOUR * apart / GLASS)
        lines.append(f"  - {{between: [{first}, {second}], bandwidth: {BACKBONE}, latency: {milliseconds:.0f}ms}}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(topology(arguments.devices, arguments.seed), end="")


if __name__ == "__main__":
    main()
