"""The OP-DAGs of the jobs that were asked about last. Any thread may ask."""

from __future__ import annotations

import threading
from collections import OrderedDict

from coordinator.life.jobs import Job
from coordinator.storage.blobs import BlobStore
from coordinator.submission import read_dag
from dag.graph import OpDag

_KEPT = 8


class Dags:
    """A small cache over the blobs."""

    def __init__(self, blobs: BlobStore, max_bytes: int) -> None:
        self._blobs = blobs
        self._max_bytes = max_bytes
        self._known: OrderedDict[str, OpDag] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, job: Job) -> OpDag:
        """The job's OP-DAG. Blocks. Raises `FusionError` when its blob is gone or damaged."""
        with self._lock:
            dag = self._known.get(job.dag.digest)
        if dag is None:
            dag = read_dag(self._blobs, job.dag, self._max_bytes)
            self.keep(job, dag)
        return dag

    def keep(self, job: Job, dag: OpDag) -> None:
        with self._lock:
            self._known[job.dag.digest] = dag
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
