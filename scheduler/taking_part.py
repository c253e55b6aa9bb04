"""A plan for what a job asks for: who takes part, where it asks for a number of workers, and then cuts and a placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from dag.graph import OpDag
from dag.workload import workload
from fusion.errors import PlanError
from fusion.plan import Plan, ScheduleName
from fusion.spec import CompressionSpec, OptimizerSpec
from scheduler.cost import Costs
from scheduler.devices import Device, Network
from scheduler.groups import groups, roomiest
from scheduler.planner import plan_job

AS_GOOD = 1.02
"""A group whose predicted step takes so many times as long is as good, and of those the one that joined first takes part."""
SEARCHED_IN_FULL = 4
"""Larger groups are compared by pipelines with one fragment for each device: everything else takes the search seconds."""

Devices = tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Training:
    """What a plan depends on besides the model and the pool."""

    micro_batches: int = 1
    schedule: ScheduleName = "1f1b"
    optimizer: OptimizerSpec | str = "adamw"
    recompute: bool = False
    clip: bool = False
    fragments: int | None = None
    ratio: float = 100.0
    workers: int | None = None
    """So many of the devices take part, those with which a step is the fastest; None: as many as are of use."""
    seed: int = 0

    @property
    def optimizer_spec(self) -> OptimizerSpec:
        found = self.optimizer
        return OptimizerSpec.model_validate({"name": found}) if isinstance(found, str) else found


def plan_for(
    dag: OpDag,
    devices: Sequence[Device],
    network: Network,
    training: Training,
    policy: str,
    compression: CompressionSpec,
    *,
    among: Sequence[Devices] | None = None,
) -> Plan:
    """The plan of one policy and compression, on the first group of `among` (`taking_part` by default) that it fits.

    Raises `PlanError` saying what the last group lacks.
    """
    refused = PlanError("there is no worker to plan for")
    for group in taking_part(dag, devices, network, training, compression) if among is None else among:
        try:
            return _plan(dag, group, network, training, policy, compression, training.fragments)
        except PlanError as error:
            refused = error
    raise refused


def taking_part(
    dag: OpDag, devices: Sequence[Device], network: Network, training: Training, compression: CompressionSpec
) -> list[Devices]:
    """Groups of as many devices as asked for, the best first; at last those with the most memory, where the rest may not fit.

    Which group is best does not depend on the policy: `op-fence` tells. Deterministic, and of equal devices on equal links
    those come first that joined first.
    """
    everybody, count = tuple(devices), training.workers
    if count is None or count >= len(everybody):
        return [everybody]
    work = workload(dag)
    costs = Costs(
        work,
        everybody,
        network,
        training.schedule,
        training.micro_batches,
        training.optimizer_spec,
        training.recompute,
        training.clip,
    )
    fragments = training.fragments
    if fragments is None and count > SEARCHED_IN_FULL:
        fragments = min(count, len(work.cut_points) + 1)
    seconds: dict[tuple[int, ...], float] = {}
    for group in groups(costs, count):
        chosen = [everybody[index] for index in group]
        try:
            plan = _plan(dag, chosen, network, training, "op-fence", compression, fragments)
        except PlanError:
            continue
        seconds[group] = plan.predicted_step_seconds or inf
    least = min(seconds.values(), default=inf)
    best = min((group for group in seconds if seconds[group] <= AS_GOOD * least), default=None)
    ranked = sorted(seconds, key=lambda group: (group != best, seconds[group], group))
    tried = dict.fromkeys((*ranked, roomiest(costs, count)))
    return [tuple(everybody[index] for index in group) for group in tried]


def _plan(
    dag: OpDag,
    devices: Sequence[Device],
    network: Network,
    training: Training,
    policy: str,
    compression: CompressionSpec,
    fragments: int | None,
) -> Plan:
    return plan_job(
        dag,
        devices,
        network,
        policy=policy,
        schedule=training.schedule,
        micro_batches=training.micro_batches,
        fragments=fragments,
        optimizer=training.optimizer,
        recompute=training.recompute,
        clip=training.clip,
        compression=compression,
        # Asked for by number, so all of them are to take part; otherwise the policy may leave slow ones out.
        use_all=training.workers is not None,
        seed=training.seed,
    )
