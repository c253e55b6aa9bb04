"""A pool on paper: workers with their speed and memory, and the links between them (YAML, design section 9).

Local mode paces its sockets to one; `fusion plan` and the simulator schedule over one.
"""

from __future__ import annotations

from functools import cached_property
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fusion.errors import SpecError
from fusion.units import ByteCount, BytesPerSecond, Seconds
from fusion.yaml_file import PlacedError, load_model, suggest


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TopologyWorker(_Section):
    """One worker of the pool."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="The worker's name.")
    region: str = Field(description="Where it stands; links are given between regions.")
    speed: float = Field(
        gt=0, allow_inf_nan=False, description="Speed in FLOP/s; for `fusion up`, relative to the fastest worker."
    )
    memory: ByteCount = Field(gt=0, description="Memory for training, e.g. 4GiB.")


class TopologyLink(_Section):
    """The link between two regions, or between two workers, which wins over the pair of their regions."""

    between: tuple[str, str] = Field(description="Two regions (the same one twice: inside it) or two workers.")
    bandwidth: BytesPerSecond = Field(gt=0, description="One way, e.g. 16Mbit/s.")
    latency: Seconds = Field(description="One way, e.g. 90ms.")


class Topology(_Section):
    """Workers and the links between each two of them."""

    workers: tuple[TopologyWorker, ...] = Field(min_length=1, description="The workers.")
    links: tuple[TopologyLink, ...] = Field((), description="The links.")

    @model_validator(mode="after")
    def _complete(self) -> Topology:
        names = [worker.name for worker in self.workers]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise PlacedError(f"two workers are called {name!r}; names are unique", "workers", index, "name")
        known = sorted({*names, *(worker.region for worker in self.workers)})
        seen: set[tuple[str, str]] = set()
        for number, link in enumerate(self.links):
            for end in link.between:
                if end not in known:
                    message = f"no worker or region is called {end!r}{suggest(end, known)}"
                    raise PlacedError(message, "links", number, "between")
            if _pair(*link.between) in seen:
                raise PlacedError(
                    f"a link between {' and '.join(link.between)} was given before", "links", number, "between"
                )
            seen.add(_pair(*link.between))
        for first, second in combinations(self.workers, 2):
            if self._find(first, second) is None:
                raise PlacedError(
                    f"no link between {first.name} and {second.name}: add "
                    f"{{between: [{first.region}, {second.region}], bandwidth: ..., latency: ...}}",
                    "links",
                )
        return self

    @cached_property
    def _links(self) -> dict[tuple[str, str], TopologyLink]:
        return {_pair(*link.between): link for link in self.links}

    @cached_property
    def _workers(self) -> dict[str, TopologyWorker]:
        return {worker.name: worker for worker in self.workers}

    def _find(self, first: TopologyWorker, second: TopologyWorker) -> TopologyLink | None:
        between_workers = self._links.get(_pair(first.name, second.name))
        return between_workers or self._links.get(_pair(first.region, second.region))

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
        return found.bandwidth, found.latency


def _pair(first: str, second: str) -> tuple[str, str]:
    return (first, second) if first <= second else (second, first)


def load_topology(path: str | Path) -> Topology:
    """Read a topology file. Raises `SpecError` with file, line and column."""
    return load_model(Path(path), Topology, "topology (YAML)")
