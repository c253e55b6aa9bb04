"""Asks the scheduler for a plan: turns what workers said of themselves into its devices, and its plan into a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

from coordinator.events import MakePlan
from coordinator.jobs import FragmentSummary, Job
from dag.cut import Fragment, cut
from dag.graph import OpDag
from fusion.messages import Device, TrainConfig
from fusion.plan import Plan
from fusion.spec import JobSpec

_AS_GOOD = 1.05
"""A placement whose predicted step time is within this is as good."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that a plan may use."""

    name: str
    device: Device
    slower: float = 1.0
    """How many times slower it has become than it measured on joining."""


class Planner(Protocol):
    """Makes a plan over `candidates`. Raises `PlanError` with the reason in words when none fits.

    A job that ran before gives its `previous` plan: its cuts and codecs are kept, because they decide the bits.
    """

    def __call__(
        self,
        dag: OpDag,
        candidates: Sequence[Candidate],
        spec: JobSpec,
        train: TrainConfig,
        previous: Plan | None,
    ) -> Plan: ...


@runtime_checkable
class Pricing(Protocol):
    """A planner that can tell how long a step takes under a plan that it did not just make."""

    def price(
        self, dag: OpDag, candidates: Sequence[Candidate], spec: JobSpec, train: TrainConfig, plan: Plan
    ) -> float | None:
        """Predicted seconds per step; None when the plan uses other workers, or more memory than one has."""


def answer(
    planner: Planner, dag_of: Callable[[Job], OpDag], job: Job, candidates: Sequence[Candidate], asked: MakePlan
) -> tuple[Plan, tuple[FragmentSummary, ...], float | None]:
    """A plan, what people see of it, and the predicted step time of the placement that the job has. Blocks.

    Raises what the planner raises.
    """
    dag = dag_of(job)
    plan = planner(dag, candidates, job.spec, job.train, asked.previous)
    current = None
    if asked.price and asked.previous is not None and isinstance(planner, Pricing):

        def price(other: Plan) -> float | None:
            return planner.price(dag, candidates, job.spec, job.train, other)

        current = price(asked.previous)
        # A running job keeps its depths, so the gain is that of the placement alone.
        plan = plan.model_copy(update={"in_flight": asked.previous.in_flight})
        plan = plan.model_copy(update={"predicted_step_seconds": price(plan)})
        plan = with_fewer_moves(asked.previous, plan, {candidate.name for candidate in candidates}, price)
    return plan, summarize(dag, plan), current


def with_fewer_moves(before: Plan, after: Plan, workers: Container[str], price: Callable[[Plan], float | None]) -> Plan:
    """The plan `after`, but for fragments that can as well stay where they are: among like workers, names are chance."""
    best = after.predicted_step_seconds
    if best is None or before.cuts != after.cuts:
        return after
    chosen = after
    for stay in (None, *range(len(before.placement))):
        # Whole workers first: two that change places can't stay one by one.
        placement = list(_renamed(before, after, workers) if stay is None else chosen.placement)
        if stay is not None and before.placement[stay] in workers:
            placement[stay] = before.placement[stay]
        if tuple(placement) == chosen.placement:
            continue
        other = after.model_copy(update={"placement": tuple(placement)})
        seconds = price(other)
        if seconds is not None and seconds <= _AS_GOOD * best:
            chosen = other.model_copy(update={"predicted_step_seconds": seconds})
    return chosen


def _renamed(before: Plan, after: Plan, workers: Container[str]) -> list[str]:
    """The placement `after` with its workers' parts given to those that have most of them already."""
    shared = Counter((new, old) for old, new in zip(before.placement, after.placement, strict=True) if old in workers)
    names: dict[str, str] = {}
    for new, old in sorted(shared, key=lambda pair: -shared[pair]):
        if new not in names and old not in names.values():
            names[new] = old
    for new in after.workers:
        if new not in names:
            free = [name for name in (new, *after.workers) if name not in names.values()]
            names[new] = free[0]
    return [names[host] for host in after.placement]


def summarize(dag: OpDag, plan: Plan) -> tuple[FragmentSummary, ...]:
    """What people see of each fragment of `plan`."""
    partition = cut(dag, plan.cuts)
    bounds = (0, *plan.cuts, len(dag.body))
    summaries = []
    for fragment, worker, (first, last) in zip(partition.fragments, plan.placement, pairwise(bounds), strict=True):
        modules = [dag.ops[op].module for op in dag.body[first:last]]
        summaries.append(
            FragmentSummary(
                index=fragment.index,
                worker=worker,
                ops=last - first,
                first_module=next((name for name in modules if name), ""),
                last_module=next((name for name in reversed(modules) if name), ""),
                parameter_bytes=_parameter_bytes(dag, fragment),
                flops=sum(dag.ops[op].flops for op in fragment.ops),
            )
        )
    return tuple(summaries)


def _parameter_bytes(dag: OpDag, fragment: Fragment) -> int:
    return sum(dag.ops[op].meta.nbytes for op in fragment.parameters)
