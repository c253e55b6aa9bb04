"""Asks the scheduler for a plan: turns what workers said of themselves into its devices, and its plan into a summary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        """Predicted seconds per step; None when the plan uses other workers."""


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
        current = planner.price(dag, candidates, job.spec, job.train, asked.previous)
    return plan, summarize(dag, plan), current


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
