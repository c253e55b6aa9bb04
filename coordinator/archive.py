"""Which checkpoints there are and who needs which blob: the books over the files of `coordinator.storage.checkpoints`.

Everything here runs on the event loop's thread, except `weights_after`, which blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable

from coordinator.life.jobs import Job
from coordinator.shown.views import ResumeFromBlobs, ResumeFromCheckpoint
from coordinator.storage.blobs import BlobStore
from coordinator.storage.checkpoints import Checkpoint, Checkpoints
from coordinator.storage.store import Store
from coordinator.submission import ResumePoint
from dag.graph import OpDag
from fusion.errors import BlobError
from fusion.messages import BlobRef

_MERCY_SECONDS = 30.0
_FORGOTTEN_SECONDS = 24 * 3600.0


class Archive:
    """Checkpoints on record, the weights blobs that were made from them, and the blobs that may go.

    `in_use` says of a digest whether some job still waits for it, beyond what is pinned in the store.
    """

    def __init__(self, store: Store, blobs: BlobStore, files: Checkpoints, in_use: Callable[[str], bool]) -> None:
        self._store = store
        self._in_use = in_use
        self._dropped: dict[str, float] = {}
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

    def record(self, written: Checkpoint, now: float, keep: int, needed: int | None = None) -> list[int]:
        """Enter a checkpoint; take those older than the newest `keep` out of the books, and return their steps.

        The one of step `needed`, from which the run began, stays: whoever adopts a fragment may have to build it from there.
        The files of the others go with `remove`, after the store has committed.
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
        older = (int(item["step"]) for item in self._store.checkpoints(written.job)[:-keep])
        old = [step for step in older if step != needed]
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
        """These blobs are needed no more by whoever asked for them; `collect` deletes them after a while."""
        now = time.time()
        self._dropped.update(dict.fromkeys(digests, now))

    def collect(self, now: float | None = None) -> None:
        """Delete blobs that were dropped a while ago, unless somebody needs them or has uploaded them again since.

        Equal jobs make equal blobs: one may have been told that its upload is here already, or go on from the same weights,
        just before another job dropped them. `now` is in seconds since the epoch, as the file system counts them.
        """
        now = time.time() if now is None else now
        merged = {ref.digest for ref in tuple(self._merged.values())}  # `weights_after` runs on other threads.
        for digest, dropped_at in list(self._dropped.items()):
            if now - dropped_at < _MERCY_SECONDS:
                continue
            del self._dropped[digest]
            needed = digest in merged or self._store.pinned(digest) or self._in_use(digest)
            if not (needed or self._blobs.touched_since(digest, dropped_at)):
                self._blobs.delete(digest)

    def sweep(self) -> None:
        """Drop what an earlier process left behind: blobs of no use that nobody touched for a day, and files of checkpoints
        that it had no time to remove, or to write to the end.

        Newer ones than are in the books stay: these may be an old copy of them. Before anything is written.
        """
        for job in self._files.jobs():
            recorded = {int(item["step"]) for item in self._store.checkpoints(job)}
            for step in self._files.steps(job):
                if step not in recorded and step < max(recorded, default=0):
                    self.remove(job, step)
            self._files.remove_unfinished(job)
        now = time.time()
        for digest, touched in self._blobs.all():
            if now - touched > _FORGOTTEN_SECONDS and not self._store.pinned(digest):
                self._dropped[digest] = now

    def weights_after(self, job: Job, dag: OpDag, found: Checkpoint) -> BlobRef:
        """The weights blob to go on from after a checkpoint. Blocks. Raises `BlobError` or `DiskFullError`."""
        key = (job.id, found.step)
        merged = self._merged.get(key)
        if merged is None or self._blobs.size(merged.digest) is None:
            merged = self._files.merged_weights(dag, job.weights, found.model, found.optimizer)
            self._merged[key] = merged
            if job.terminal:  # It has ended meanwhile.
                self.job_ended(job.id)
        return merged

    def job_ended(self, job: str) -> None:
        """The blobs that were made for going on are needed no more."""
        self.drop(self._merged.pop(key).digest for key in list(self._merged) if key[0] == job)

    def resume_point(
        self, resume: ResumeFromCheckpoint | ResumeFromBlobs | None, jobs: Container[str]
    ) -> ResumePoint | None:
        """What a submission wants to start from, of these jobs. Raises `BlobError`."""
        if isinstance(resume, ResumeFromCheckpoint):
            job, _, step = resume.checkpoint.partition("@")
            found = self.find(job, int(step))
            if found is None:
                known = [str(item["step"]) for item in self._store.checkpoints(job)]
                there = f"it has {', '.join(known)}" if known else "it has none"
                if job not in jobs:
                    there = "there is no such job"
                raise BlobError(f"no checkpoint {resume.checkpoint}: {there}")
            return ResumePoint(found.step, found.model, found.optimizer)
        if isinstance(resume, ResumeFromBlobs):
            self._blobs.require(resume.model, "resume.model")
            if resume.optimizer is not None:
                self._blobs.require(resume.optimizer, "resume.optimizer")
            return ResumePoint(resume.step, resume.model, resume.optimizer)
        return None
