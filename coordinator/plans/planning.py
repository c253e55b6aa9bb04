"""Asks the scheduler for a plan: turns what workers said of themselves into its devices, and its plan into a summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Protocol, runtime_checkable

from coordinator.life.events import MakePlan
from coordinator.life.jobs import FragmentSummary, Job
from dag.cut import Fragment, Partition, bits_follow_cuts, cut
from dag.graph import OpDag
from fusion.errors import PlanError
from fusion.messages import Device, LinkFigures, TrainConfig
from fusion.plan import Plan
from fusion.spec import JobSpec
from scheduler.edge_bytes import sent

_AS_GOOD = 1.05
"""A placement whose predicted step time is within this is as good."""
_NOISE = 1.25
"""Speeds of machines of one kind that differ by less are taken for the same."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that a plan may use."""

    name: str
    device: Device
    slower: float = 1.0
    """How many times slower it is than it measured on joining."""
    place: str = ""
    """The network that it is in (`fusion.addresses.place_of`)."""
    links: Mapping[str, LinkFigures | str] = field(default_factory=dict)
    """To other candidates, as measured; words where the link does not work."""


def alike(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, those on like machines with the same speed up to noise given the same rates.

    Every measurement has its own error; without this, equal workers would get unequal shares, and another run other cuts.
    """
    groups: list[list[Candidate]] = []
    for candidate in sorted(candidates, key=lambda each: each.device.flops_per_second):
        group = next((group for group in groups if _twins(group[0], candidate)), None)
        if group is None:
            groups.append([candidate])
        else:
            group.append(candidate)
    common = {each.name: rates for group in groups for rates in [_common(group)] for each in group}
    return [replace(each, device=each.device.model_copy(update=common[each.name])) for each in candidates]


def _twins(slower: Candidate, faster: Candidate) -> bool:
    first, second = slower.device, faster.device
    if (first.kind, first.description, first.cores, first.threads, first.declared) != (
        second.kind,
        second.description,
        second.cores,
        second.threads,
        second.declared,
    ):
        return False
    if first.declared:
        return first.flops_per_second == second.flops_per_second
    same_machine = slower.place == faster.place == ""
    return same_machine or second.flops_per_second <= _NOISE * first.flops_per_second


def _common(group: Sequence[Candidate]) -> dict[str, float]:
    """Whatever else ran meanwhile made a measured speed lower, never higher."""
    devices = [each.device for each in group]
    rates: dict[str, float] = {}
    for rate in ("flops_per_second", "convolution_flops_per_second", "bytes_per_second"):
        rates[rate] = max(getattr(device, rate) for device in devices)
    for speed, share, fixed in (
        ("flops_per_second", "training_share", "seconds_per_call"),
        ("convolution_flops_per_second", "convolution_share", "seconds_per_convolution"),
    ):
        regressed = [device for device in devices if getattr(device, share) > 0]
        if regressed and rates[speed] > 0:
            reached = median(getattr(device, share) * getattr(device, speed) for device in regressed)
            rates[share] = min(1.0, reached / rates[speed])
            rates[fixed] = median(getattr(device, fixed) for device in regressed)
    rested = [device.seconds_after_rest for device in devices if device.seconds_after_rest > 0]
    rates["seconds_after_rest"] = median(rested) if rested else 0.0
    return rates


class Planner(Protocol):
    """Makes a plan over `candidates`. Raises `PlanError` with the reason in words when none fits.

    A fresh job that asks for a number of workers is offered all that are idle: the plan uses as many of them as were asked for.
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


@runtime_checkable
class Predicting(Protocol):
    """A planner that can tell how long each fragment's own work takes."""

    def work_seconds(
        self, dag: OpDag, candidates: Sequence[Candidate], train: TrainConfig, plan: Plan
    ) -> tuple[float, ...]:
        """Of one step, by fragment."""


def answer(
    planner: Planner, dag_of: Callable[[Job], OpDag], job: Job, candidates: Sequence[Candidate], asked: MakePlan
) -> tuple[Plan, tuple[FragmentSummary, ...], float | None]:
    """A plan, what people see of it, and the predicted step time of the placement that the job has. Blocks.

    Raises what the planner raises.
    """
    dag, candidates = dag_of(job), alike(candidates)
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
    summaries = summarize(dag, plan)
    if isinstance(planner, Predicting):
        as_said = [replace(candidate, slower=1.0) for candidate in candidates]
        work = planner.work_seconds(dag, as_said, job.train, plan)
        summaries = tuple(
            summary.model_copy(update={"seconds": seconds}) for summary, seconds in zip(summaries, work, strict=True)
        )
    return plan, summaries, current


def anew(planner: Planner, dag_of: Callable[[Job], OpDag], job: Job, candidates: Sequence[Candidate]) -> float | None:
    """The predicted step time of a plan with other cuts; None when there is none that leaves the bits as they are. Blocks."""
    dag = dag_of(job)
    try:
        plan = planner(dag, alike(candidates), job.spec, job.train, None)
    except PlanError:
        return None
    cuts = [plan.cuts] if job.plan is None else [plan.cuts, job.plan.cuts]
    return None if any(bits_follow_cuts(dag, cut(dag, each)) for each in cuts) else plan.predicted_step_seconds


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
    traffic = _traffic(partition, plan)
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
                parameters=sum(dag.ops[op].meta.elements for op in fragment.parameters),
                parameter_bytes=_parameter_bytes(dag, fragment),
                flops=sum(dag.ops[op].flops for op in fragment.ops),
                backward_flops=sum(dag.ops[op].backward_flops for op in fragment.ops),
                traffic=dict(sorted(traffic[fragment.index].items())),
            )
        )
    return tuple(summaries)


def _traffic(partition: Partition, plan: Plan) -> list[Counter[int]]:
    """By fragment: the bytes that it exchanges with each other one for a micro-batch."""
    found = [Counter[int]() for _ in partition.fragments]
    for each in sent(partition, plan):
        if not each.once_a_step:
            found[each.edge.source][each.edge.target] += each.wire_bytes
            found[each.edge.target][each.edge.source] += each.wire_bytes
    return found


def _parameter_bytes(dag: OpDag, fragment: Fragment) -> int:
    return sum(dag.ops[op].meta.nbytes for op in fragment.parameters)
