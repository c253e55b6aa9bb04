"""A pool whose workers are placed in network namespaces and do what the switches of `placed_worker.py` say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.shaping import ShapedNetwork
from benchmarks.testbed import Testbed
from fusion.local import LocalPool, LocalWorker


class PlacedPool(LocalPool):
    """A pool whose workers are in a network namespace each, or without a `network` all on loopback.

    Plans are made for `topology`: the network has its links, and in namespaces workers are slowed down to its speeds.
    """

    def __init__(
        self,
        folder: Path,
        workers: Sequence[str],
        network: ShapedNetwork | Testbed | None = None,
        topology: Path | None = None,
    ) -> None:
        self._notes = folder / "notes"
        self._notes.mkdir(parents=True)
        os.environ["NOTES"] = str(self._notes)
        for worker, namespace in (network.namespaces if network is not None else {}).items():
            (self._notes / f"{worker}.namespace").write_text(namespace, encoding="utf-8")
        super().__init__(
            folder,
            [LocalWorker(name) for name in workers],
            host=network.host if network is not None else "127.0.0.1",
            dashboard=False,
            topology=topology,
            act_out=network is not None,
            worker_module="benchmarks.placed_worker",
        )

    def switch(self, name: str, on: bool) -> None:
        """Turn one of the workers' switches on or off."""
        if on:
            (self._notes / name).touch()
        else:
            (self._notes / name).unlink(missing_ok=True)

    def last_reported(self, worker: str) -> int:
        """The last step that this worker, which may be dead, has reported."""
        return int((self._notes / f"{worker}.step").read_text(encoding="utf-8"))
