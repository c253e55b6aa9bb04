"""A pool on paper: workers with their speed and memory, and the links between them (YAML, design section 9).

Local mode paces its sockets to one; `fusion plan` and the simulator schedule over one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from fusion.errors import SpecError
from fusion.units import SPEED, Bandwidth, Seconds, SomeBytes, Within, parse_seconds
from fusion.yaml_file import PlacedError, load_model, suggest
from fusion.yaml_file import Section as _Section

MOST_WORKERS = 10_000
MOST_LETTERS = 64
"""Of a worker's name."""


class TopologyWorker(_Section):
    """One worker of the pool, or several that are alike."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="The worker's name.")
    count: int = Field(
        1, ge=1, le=MOST_WORKERS, description="So many alike workers, called NAME-1, NAME-2 and so on; 1: just NAME."
    )
    region: str = Field(description="Where it stands; links are given between regions.")
    speed: Annotated[float, SPEED] = Field(
        description="Speed in FLOP/s; for `fusion up`, relative to the fastest worker."
    )
    memory: SomeBytes = Field(description="Memory for training, e.g. 4GiB.")
    memory_bandwidth: Bandwidth | None = Field(
        None, description="Memory traffic, e.g. 448GB/s. Default: a byte per 8 FLOP."
    )
    access: Bandwidth | None = Field(
        None,
        description="Its own connection's slower way, e.g. 20Mbit/s: no link between regions is faster for it.",
    )

    def each(self) -> Iterator[TopologyWorker]:
        """The workers that this entry stands for."""
        if self.count == 1:
            yield self
            return
        for number in range(1, self.count + 1):
            yield self.model_copy(update={"name": f"{self.name}-{number}", "count": 1})


class TopologyLink(_Section):
    """The link between two regions, or between two workers, which wins over the pair of their regions."""

    between: tuple[str, str] = Field(
        description="Two regions (the same one twice: inside it) or two workers. Where workers are called like their regions, "
        "their regions are meant."
    )
    bandwidth: Bandwidth = Field(description="One way, e.g. 16Mbit/s.")
    latency: Annotated[Seconds, Within(parse_seconds, "0s", "1h")] = Field(description="One way, e.g. 90ms.")


class Topology(_Section):
    """Workers and the links between each two of them."""

    workers: tuple[TopologyWorker, ...] = Field(min_length=1, description="The workers.")
    links: tuple[TopologyLink, ...] = Field((), description="The links.")

    @model_validator(mode="after")
    def _complete(self) -> Topology:
        workers = self._each()
        regions = {worker.region for worker in self.workers}
        known = sorted({*workers, *regions})
        seen: set[tuple[str, str]] = set()
        for number, link in enumerate(self.links):
            for end in link.between:
                if end not in known:
                    message = f"no worker or region is called {end!r}{suggest(end, known)}"
                    raise PlacedError(message, "links", number, "between")
            if mixed := _mixed(*link.between, workers, regions):
                raise PlacedError(mixed, "links", number, "between")
            if _pair(*link.between) in seen:
                raise PlacedError(
                    f"a link between {' and '.join(link.between)} was given before", "links", number, "between"
                )
            seen.add(_pair(*link.between))
        # From here on, every worker has an entry of its own.
        self.__dict__["workers"] = tuple(workers.values())
        self._check_every_pair()
        return self

    def _each(self) -> dict[str, TopologyWorker]:
        """Every worker by its name, with counts written out."""
        found: dict[str, TopologyWorker] = {}
        for index, entry in enumerate(self.workers):
            if len(found) + entry.count > MOST_WORKERS:
                raise PlacedError(f"more than {MOST_WORKERS} workers; give fewer", "workers", index)
            for worker in entry.each():
                if worker.name in found:
                    message = f"two workers are called {worker.name!r}; names are unique"
                    raise PlacedError(message, "workers", index, "name")
                if len(worker.name) > MOST_LETTERS:
                    message = f"{worker.name!r} is longer than {MOST_LETTERS} letters; give a shorter name"
                    raise PlacedError(message, "workers", index, "name")
                found[worker.name] = worker
        return found

    def _check_every_pair(self) -> None:
        """Region by region, as pools may have a million pairs of workers."""
        regions: dict[str, list[TopologyWorker]] = {}
        for worker in self.workers:
            regions.setdefault(worker.region, []).append(worker)
        for here, there in combinations_with_replacement(regions, 2):
            if _pair(here, there) in self.region_links:
                continue
            for first in regions[here]:
                for second in regions[there]:
                    if first is not second and self._find(first, second) is None:
                        raise PlacedError(
                            f"no link between {first.name} and {second.name}: add "
                            f"{{between: [{here}, {there}], bandwidth: ..., latency: ...}}",
                            "links",
                        )

    @cached_property
    def region_links(self) -> dict[tuple[str, str], TopologyLink]:
        """Links between regions, by their two names in order."""
        regions = {worker.region for worker in self.workers}
        return {_pair(*link.between): link for link in self.links if regions >= set(link.between)}

    @cached_property
    def worker_links(self) -> dict[tuple[str, str], TopologyLink]:
        """Links between workers, by their two names in order. A link that also joins their regions is not one of these."""
        found: dict[tuple[str, str], TopologyLink] = {}
        for link in self.links:
            pair = _pair(*link.between)
            first, second = (self._workers.get(end) for end in pair)
            if first and second and first is not second and _pair(first.region, second.region) != pair:
                found[pair] = link
        return found

    @cached_property
    def _workers(self) -> dict[str, TopologyWorker]:
        return {worker.name: worker for worker in self.workers}

    def _find(self, first: TopologyWorker, second: TopologyWorker) -> tuple[float, float] | None:
        """Bandwidth and latency of a pair; a link given for two workers holds as it is, whatever their access."""
        link = self.worker_links.get(_pair(first.name, second.name))
        if link is not None:
            return link.bandwidth, link.latency
        link = self.region_links.get(_pair(first.region, second.region))
        if link is None:
            return None
        access = [end.access for end in (first, second) if end.access]
        return min((link.bandwidth, *access)), link.latency

    def worker(self, name: str) -> TopologyWorker:
        """The worker of that name. Raises `SpecError`."""
        found = self._workers.get(name)
        if found is None:
            raise SpecError(f"the topology has no worker {name!r}{suggest(name, sorted(self._workers))}")
        return found

    def names(self, name: str) -> bool:
        """Whether there is a worker of that name."""
        return name in self._workers

    def slowdown(self, name: str) -> float:
        """How many times slower than the fastest worker this one is. Raises `SpecError`."""
        return max(worker.speed for worker in self.workers) / self.worker(name).speed

    def link(self, first: str, second: str) -> tuple[float, float]:
        """(bytes per second, seconds of one-way latency) between two workers; (inf, 0) from a worker to itself."""
        if first == second:
            self.worker(first)
            return float("inf"), 0.0
        found = self._find(self.worker(first), self.worker(second))
        if found is None:
            raise SpecError(f"the topology has no link between {first} and {second}")
        return found


def _mixed(first: str, second: str, workers: Collection[str], regions: Collection[str]) -> str | None:
    """What is wrong with a link whose ends are neither two regions nor two workers."""
    if (first in regions and second in regions) or (first in workers and second in workers and first != second):
        return None
    if first == second:
        return f"{first!r} is one worker, and a link has two ends; give two regions or two workers"
    worker, region = (first, second) if second in regions else (second, first)
    return f"{worker!r} is a worker and {region!r} a region; give two regions or two workers"


def _pair(first: str, second: str) -> tuple[str, str]:
    return (first, second) if first <= second else (second, first)


def load_topology(path: str | Path) -> Topology:
    """Read a topology file. Raises `SpecError` with file, line and column."""
    return load_model(Path(path), Topology, "topology (YAML)")
