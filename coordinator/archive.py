"""Which checkpoints there are and who needs which blob: the books over the files of `coordinator.checkpoints`.

Everything here runs on the event loop's thread, except `weights_after`, which blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.blobs import BlobStore
from coordinator.checkpoints import Checkpoint, Checkpoints
from coordinator.jobs import Job
from coordinator.store import Store
from dag.graph import OpDag
from fusion.messages import BlobRef


class Archive:
    """Checkpoints on record, and the weights blobs that were made from them."""

    def __init__(self, store: Store, blobs: BlobStore, files: Checkpoints) -> None:
        self._store = store
        self._blobs = blobs
        self._files = files
        self._merged: dict[tuple[str, int], BlobRef] = {}

    def find(self, job: str, step: int) -> Checkpoint | None:
        """A recorded checkpoint, or None."""
        for item in self._store.checkpoints(job):
            if item["step"] == step:
                return Checkpoint(
                    job, step, BlobRef.model_validate(item["model"]), BlobRef.model_validate(item["optimizer"])
                )
        return None

    def record(self, written: Checkpoint, now: float, keep: int) -> list[int]:
        """Enter a checkpoint; take those older than the newest `keep` out of the books, and return their steps.

        Their files go with `remove`, after the store has committed.
        """
        self._store.save_checkpoint(
            written.job,
            written.step,
            {
                "job": written.job,
                "step": written.step,
                "time": now,
                "model": written.model.model_dump(),
                "optimizer": written.optimizer.model_dump(),
            },
        )
        self._store.pin(f"checkpoint/{written.job}@{written.step}", [written.model.digest, written.optimizer.digest])
        old = [int(item["step"]) for item in self._store.checkpoints(written.job)[:-keep]]
        for step in old:
            self._store.delete_checkpoint(written.job, step)
        return old

    def remove(self, job: str, step: int) -> None:
        """Delete the files of a checkpoint that is out of the books."""
        unneeded = set(self._store.unpin(f"checkpoint/{job}@{step}"))
        merged = self._merged.pop((job, step), None)
        if merged is not None:
            unneeded.add(merged.digest)
        self._store.commit()
        self._files.remove(job, step)
        self.drop(unneeded)

    def drop(self, digests: Iterable[str]) -> None:
        """Delete blobs, unless somebody needs them."""
        for digest in digests:
            if not self._store.pinned(digest):
                self._blobs.delete(digest)

    def weights_after(self, job: Job, dag: OpDag, found: Checkpoint) -> BlobRef:
        """The weights blob to go on from after a checkpoint. Blocks. Raises `BlobError` or `DiskFullError`."""
        key = (job.id, found.step)
        merged = self._merged.get(key)
        if merged is None or self._blobs.size(merged.digest) is None:
            merged = self._files.merged_weights(dag, job.weights, found.model, found.optimizer)
            self._merged[key] = merged
        return merged

    def job_ended(self, job: str) -> None:
        """The blobs that were made for going on are needed no more."""
        self.drop(self._merged.pop(key).digest for key in list(self._merged) if key[0] == job)
