"""Every policy and codec side by side on one topology, without a pool: what `fusion plan --compare` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dag.graph import OpDag
from dag.workload import workload
from fusion.errors import PlanError
from fusion.plan import Plan, ScheduleName
from fusion.spec import CompressionSpec, OptimizerSpec
from fusion.topology import Topology
from scheduler.compression import message_bytes
from scheduler.cost import Costs
from scheduler.devices import Device, Network, from_topology
from scheduler.planner import plan_job
from scheduler.policies import POLICIES
from scheduler.simulator import STEPS, Simulation, simulate

CodecName = Literal["none", "bf16", "int8", "topk", "adatopk", "auto"]
CODECS: tuple[CodecName, ...] = ("none", "bf16", "int8", "topk", "adatopk", "auto")


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
    use_all: bool = False
    seed: int = 0


def simulate_plan(
    dag: OpDag,
    plan: Plan,
    devices: Sequence[Device],
    network: Network | None = None,
    training: Training | None = None,
    *,
    steps: int = STEPS,
) -> Simulation:
    """Play a plan on these devices. Raises `PlanError` when it places a fragment on a worker that is not among them."""
    settings = training or Training()
    spec = settings.optimizer
    optimizer = OptimizerSpec.model_validate({"name": spec}) if isinstance(spec, str) else spec
    work = workload(dag)
    costs = Costs(
        work,
        tuple(devices),
        network or Network(),
        plan.schedule,
        settings.micro_batches,
        optimizer,
        settings.recompute,
    )
    index = {device.name: number for number, device in enumerate(devices)}
    for name in plan.placement:
        if name not in index:
            raise PlanError(f"the plan names worker {name}, which is not in the pool: {', '.join(index)}")
    sizes = message_bytes(work, work.crossings(plan.cuts), plan.codecs)
    hosts = [index[name] for name in plan.placement]
    return simulate(costs, plan.cuts, hosts, plan.in_flight, sizes, clip=settings.clip, steps=steps)


def compare(
    dag: OpDag,
    topology: Topology,
    training: Training | None = None,
    *,
    policies: Sequence[str] = tuple(POLICIES),
    codecs: Sequence[CodecName] = CODECS,
) -> list[dict[str, Any]]:
    """One plain dict for each policy and codec, in that order, ready for JSON.

    Keys: `policy`, `codec`, `step_seconds`, `bubble`, `bytes_per_link` (`"a -> b"` -> wire bytes per step),
    `memory_per_worker` (bytes), `placement` (worker of each fragment), `cuts`, `in_flight`, `wire_ratio` (tensor bytes over
    wire bytes of all crossings) and `reason`: None, or why there is no plan, when the other figures are None or empty.
    """
    devices, network = from_topology(topology)
    return [
        describe(dag, devices, network, training or Training(), policy, codec)
        for policy in policies
        for codec in codecs
    ]


def describe(
    dag: OpDag, devices: Sequence[Device], network: Network, training: Training, policy: str, codec: CodecName
) -> dict[str, Any]:
    """Plan and simulate one policy and codec; one row of `compare`."""
    try:
        plan = plan_job(
            dag,
            devices,
            network,
            policy=policy,
            schedule=training.schedule,
            micro_batches=training.micro_batches,
            fragments=training.fragments,
            optimizer=training.optimizer,
            recompute=training.recompute,
            compression=CompressionSpec(codec=codec, ratio=training.ratio),
            use_all=training.use_all,
            seed=training.seed,
        )
    except PlanError as error:
        return row(policy, codec, reason=str(error))
    simulation = simulate_plan(dag, plan, devices, network, training)
    return row(policy, codec, plan, simulation, wire_ratio(dag, plan))


def row(
    policy: str,
    codec: str,
    plan: Plan | None = None,
    simulation: Simulation | None = None,
    ratio: float | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """A plan and its simulation as plain values."""
    return {
        "policy": policy,
        "codec": codec,
        "step_seconds": simulation.step_seconds if simulation else None,
        "bubble": simulation.bubble if simulation else None,
        "bytes_per_link": {
            f"{source} -> {target}": round(size) for (source, target), size in simulation.bytes_per_link.items()
        }
        if simulation
        else {},
        "memory_per_worker": {name: round(size) for name, size in simulation.memory_per_worker.items()}
        if simulation
        else {},
        "placement": list(plan.placement) if plan else [],
        "cuts": list(plan.cuts) if plan else [],
        "in_flight": list(plan.in_flight) if plan else [],
        "wire_ratio": ratio,
        "reason": reason,
    }


def wire_ratio(dag: OpDag, plan: Plan) -> float:
    """Tensor bytes over wire bytes, of all messages of a micro-batch; 1 without a codec or without a crossing."""
    work = workload(dag)
    crossings = work.crossings(plan.cuts)
    moving = ~crossings.parameter
    raw, _ = message_bytes(work, crossings, {})
    forward, backward = message_bytes(work, crossings, plan.codecs)
    returning = moving & crossings.gradient
    sent = float(forward[moving].sum() + backward[returning].sum())
    return float(raw[moving].sum() + raw[returning].sum()) / sent if sent else 1.0
