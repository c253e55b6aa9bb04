"""Collects the parts of checkpoints from the workers and has a checkpoint written when it is whole. Sans-I/O.

It is written when its step has been given out, an evaluation's loss included: who goes on from it computes none of that again.
"""

from __future__ import annotations

from coordinator.life import events as ev
from coordinator.life import progress
from coordinator.life.books import Books
from coordinator.life.jobs import Job
from fusion.messages import CheckpointPart
from fusion.units import format_bytes


class Collecting:
    """Half-collected checkpoints of all jobs."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def part(self, job: Job, part: CheckpointPart) -> None:
        """A fragment's state is uploaded; by more than one worker when one of them adopted the fragment."""
        assert job.plan is not None
        parts = job.parts.get(part.step, {})
        late = job.checkpoint is not None and part.step <= job.checkpoint
        known = _due(job, part.step) and 0 <= part.fragment < len(job.plan.placement)
        if late or not known or part.step in job.writing:
            if part.blob not in parts.values():
                self.let_go(part)
            return
        before = parts.get(part.fragment)
        job.parts.setdefault(part.step, parts)[part.fragment] = part.blob
        if before is not None and before not in parts.values():
            self._books.do(ev.DropBlobs((before.digest,)))
        self.write_whole(job)
        self._books.save(job, announce=False)

    def let_go(self, part: CheckpointPart) -> None:
        """Of no use: its job is over, or goes on from elsewhere."""
        self._books.do(ev.DropBlobs((part.blob.digest,)))

    def write_whole(self, job: Job) -> None:
        """Have those written that are whole, and whose step is given out and past its spot checks."""
        for step, parts in sorted(job.parts.items()):
            waiting = step > job.step or progress.unsettled(job, step)
            if job.whole(step) and step not in job.writing and not waiting:
                job.writing.append(step)
                self._books.do(ev.WriteCheckpoint(job.id, step, dict(parts), job.spec.checkpoint.keep))
                self._books.save(job, announce=False)

    def copied(self, job: Job, event: ev.CheckpointCopied) -> None:
        """A copy of a checkpoint is where copies go, or is not."""
        if event.reason is None:
            words = f"checkpoint at step {event.step} copied to {event.where}"
            self._books.story(job, "checkpoint-copied", words, step=event.step)
        else:
            words = (
                f"checkpoint at step {event.step} could not be copied to {event.where}: {event.reason}; it is kept here"
            )
            self._books.story(job, "checkpoint-copy-failed", words, step=event.step)

    def over(self, job: Job, event: ev.CheckpointWritten | ev.CheckpointFailed) -> None:
        """A checkpoint is written, or could not be."""
        if event.step in job.writing:
            job.writing.remove(event.step)
        # With a newer checkpoint there, half-collected older ones are of no use.
        written = isinstance(event, ev.CheckpointWritten)
        stale = [step for step in job.parts if written and step < event.step and step not in job.writing]
        self._books.do(ev.DropBlobs(tuple(ref.digest for step in stale for ref in job.parts[step].values())))
        job.parts = {step: parts for step, parts in job.parts.items() if step not in (*stale, event.step)}
        if isinstance(event, ev.CheckpointWritten):
            job.checkpoint = max(event.step, job.checkpoint or 0)
            self._books.story(
                job,
                "checkpoint",
                f"checkpoint at step {event.step} written ({format_bytes(event.size)})",
                step=event.step,
                bytes=event.size,
            )
        else:
            self._books.story(
                job,
                "checkpoint-failed",
                f"checkpoint at step {event.step} could not be written: {event.reason}; training goes on",
                step=event.step,
            )
        self._books.save(job)


def _due(job: Job, step: int) -> bool:
    """Whether there is to be a checkpoint after this step."""
    every, last = job.train.checkpoint_every, job.train.steps
    return step == last or bool(every and 0 < step < last and step % every == 0)
