"""Adds up what the tasks of a step tell, and makes the step's reports of it. Sans I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from executor.ordering import Task, TaskKind
from fusion.messages import EvaluationReport, FragmentTimes, StepReport, TrainConfig


class Accounts:
    """The open steps of one worker's fragments."""

    def __init__(self, job: str, train: TrainConfig) -> None:
        self._job = job
        self._train = train
        # By fragment and step.
        self._losses: dict[tuple[int, int], list[float]] = defaultdict(list)
        self._evaluations: dict[tuple[int, int], list[float]] = defaultdict(list)
        self._seconds: dict[tuple[int, int], dict[TaskKind, float]] = defaultdict(lambda: defaultdict(float))
        self._norms: dict[int, float] = {}
        self._waited = 0.0
        self._furthest: tuple[int, float] | None = None

    def spent(self, task: Task, seconds: float) -> None:
        """`task` took this long. Evaluations are not accounted for: they come after the step's report."""
        if task.kind is not TaskKind.EVALUATE:
            self._seconds[task.fragment, task.step][task.kind] += seconds

    def waited(self, seconds: float) -> None:
        """There was nothing to do for this long."""
        self._waited += seconds

    def lost(self, fragment: int, step: int, loss: float) -> None:
        """The loss of the step's next micro-batch."""
        self._losses[fragment, step].append(loss)

    def clipped(self, step: int, norm: float) -> None:
        """The global gradient norm before clipping."""
        self._norms[step] = norm

    def forget(self, fragments: Collection[int]) -> None:
        """These run elsewhere from now on, and the steps that they were in there once more."""
        for accounts in (self._losses, self._evaluations, self._seconds):
            for key in [key for key in accounts if key[0] in fragments]:
                del accounts[key]

    def step_report(
        self,
        epoch: int,
        step: int,
        fragments: Sequence[int],
        sent: dict[str, int],
        memory_used: int,
        log_bytes: int,
        now: float,
    ) -> StepReport:
        """The report of a step that these fragments have run here, `now` in seconds; closes the step's accounts."""
        losses = [loss for fragment in fragments for loss in self._losses.pop((fragment, step), ())]
        waited, self._waited = self._waited, 0.0
        seconds = {fragment: self._seconds.pop((fragment, step)) for fragment in fragments}
        return StepReport(
            job=self._job,
            epoch=epoch,
            step=step,
            fragments=[
                FragmentTimes(
                    fragment=fragment,
                    forward=spent[TaskKind.FORWARD],
                    backward=spent[TaskKind.BACKWARD] + spent[TaskKind.WEIGHTS],
                    update=spent[TaskKind.UPDATE],
                )
                for fragment, spent in seconds.items()
            ],
            loss=sum(losses) / self._train.micro_batches if losses else None,
            gradient_norm=self._norms.pop(step, None),
            sent_bytes=sum(sent.values()),
            sent_to=sent,
            seconds=self._since_the_step_before(step, now),
            wait_seconds=waited,
            memory_used_bytes=memory_used,
            log_bytes=log_bytes,
        )

    def _since_the_step_before(self, step: int, now: float) -> float | None:
        before, at = self._furthest or (step, now)
        if step > before or self._furthest is None:
            self._furthest = step, now
        return now - at if step == before + 1 else None

    def evaluated(self, epoch: int, fragment: int, step: int, loss: float) -> EvaluationReport | None:
        """The loss of the next evaluation batch after `step`; the report once all are there."""
        losses = self._evaluations[fragment, step]
        losses.append(loss)
        if len(losses) < self._train.eval_batches:
            return None
        del self._evaluations[fragment, step]
        mean = sum(losses) / len(losses)
        return EvaluationReport(job=self._job, epoch=epoch, step=step, loss=mean, batches=len(losses))
