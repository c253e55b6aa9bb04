"""The ordinary worker, put into a network namespace, with three switches, and a note of the last step that it reported.

`python -m benchmarks.placed_worker worker --join URL ...`; the folder NOTES is what `placed_pool.py` shares with it:

- `NAME.namespace`: the network namespace to enter, if there is such a file;
- `NAME.step`: written here, the last step that was reported; whoever kills the worker reads what it had done;
- `refuse`: while there is such a file, no fragment is adopted, as if no snapshot was held anywhere;
- `bare`: a job that is prepared while there is such a file takes no snapshots and keeps no log;
- `whole`: in a job that is prepared while there is such a file, no gradients of weights wait: a backward is one task.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import namespaces
from fusion.cli import main
from fusion.topology import Topology

REFUSE = "refuse"
BARE = "bare"
WHOLE = "whole"


def slow_down_only() -> None:
    """Of a topology act out the speed alone: the network has its links already."""
    from worker import service
    from worker.transport.surroundings import Surroundings

    def speed(topology: Topology, name: str) -> Surroundings:
        return Surroundings(slowdown=topology.slowdown(name))

    service.surroundings = speed


def install(notes: Path, name: str) -> None:
    from fusion.errors import BlobError
    from fusion.messages import Backup, Prepare
    from worker.jobs import assembly
    from worker.jobs.host import JobHost
    from worker.jobs.job_parts import Parts
    from worker.jobs.job_run import JobRun, Order

    report, adopt, begin, take = JobHost._report_step, Parts.install, JobRun.__init__, JobRun.take
    note = os.open(notes / f"{name}.step", os.O_WRONLY | os.O_CREAT, 0o600)
    bare: set[str] = set()

    def report_and_note(self: JobHost, step: int, fragments: tuple[int, ...]) -> None:
        report(self, step, fragments)
        os.pwrite(note, f"{step:12}".encode(), 0)

    async def adopt_or_refuse(self: Parts, *args: Any) -> Any:
        if (notes / REFUSE).exists():
            raise BlobError("no snapshot is held, as the benchmark wants it")
        return await adopt(self, *args)

    def begin_full_or_bare(self: JobRun, prepare: Prepare, *args: Any, **options: Any) -> None:
        if (notes / BARE).exists():
            bare.add(prepare.job)
            prepare = prepare.model_copy(update={"log_bytes": 0, "backups": {}})
        begin(self, prepare, *args, **options)

    def take_unless_bare(self: JobRun, order: Order) -> None:
        if not (isinstance(order, Backup) and self.job in bare):
            take(self, order)

    cut = assembly.cut

    def cut_for_whole_backwards(*args: Any) -> Any:
        found = cut(*args)
        if not (notes / WHOLE).exists():
            return found
        return replace(found, fragments=tuple(replace(each, postponed=()) for each in found.fragments))

    assembly.cut = cut_for_whole_backwards  # type: ignore[attr-defined]
    JobHost._report_step = report_and_note  # type: ignore[method-assign]
    Parts.install = adopt_or_refuse  # type: ignore[method-assign, assignment]
    JobRun.__init__ = begin_full_or_bare  # type: ignore[method-assign]
    JobRun.take = take_unless_bare  # type: ignore[method-assign]


if __name__ == "__main__":
    NOTES, NAME = Path(os.environ["NOTES"]), sys.argv[sys.argv.index("--name") + 1]
    place = NOTES / f"{NAME}.namespace"
    if place.exists():
        namespaces.enter(place.read_text(encoding="utf-8"))
        slow_down_only()
    install(NOTES, NAME)
    main()
