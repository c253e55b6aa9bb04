"""A pool of placed workers, on loopback or with a network namespace and a link of a given rate for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import topologies
from benchmarks.placed_pool import PlacedPool
from benchmarks.shaping import ShapedNetwork


@contextmanager
def shaped_pool(folder: Path, workers: Sequence[str], bits_per_second: float | None) -> Iterator[PlacedPool]:
    """The pool, once all of its workers have joined; no rate: loopback. Rates take root, see `shaping.unavailable`.

    Plans know the rates beforehand, so that they do not depend on when a job begins and what was measured by then.
    """
    if bits_per_second is None:
        with PlacedPool(folder, workers) as pool:
            pool.wait_for_workers()
            yield pool
    else:
        topology = topologies.write(topologies.alike(workers, bits_per_second / 1e6), folder / "topology.yaml")
        with (
            ShapedNetwork(workers, bits_per_second) as network,
            PlacedPool(folder, workers, network, topology) as pool,
        ):
            pool.wait_for_workers()
            yield pool
