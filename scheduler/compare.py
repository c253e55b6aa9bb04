"""Every policy and codec side by side on one topology, without a pool: what `fusion plan --compare` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from compress.settings import TopK, parse
from dag.graph import OpDag
from dag.workload import workload
from fusion.errors import PlanError
from fusion.plan import CodecChoice, Plan
from fusion.spec import CompressionSpec
from fusion.topology import Topology
from scheduler.cost import Costs
from scheduler.devices import Device, Network, from_topology
from scheduler.messages import Floats, messages
from scheduler.policies import POLICIES
from scheduler.simulation import Simulation
from scheduler.simulator import STEPS, simulate
from scheduler.taking_part import Devices, Training, plan_for, taking_part

CodecName = Literal["none", "bf16", "int8", "int4", "topk", "adatopk", "adaint", "auto"]
MOST_PLAYED = 16_384
"""Forwards per step up to which all `STEPS` are played; of longer pipelines one step is, with filling the pipeline."""
BASELINES = ("equal-ops", "equal-compute")
CODECS: tuple[CodecName, ...] = ("none", "bf16", "int8", "int4", "topk", "adatopk", "adaint", "auto")


def simulate_plan(
    dag: OpDag,
    plan: Plan,
    devices: Sequence[Device],
    network: Network | None = None,
    training: Training | None = None,
    *,
    steps: int = STEPS,
    trace: bool = True,
) -> Simulation:
    """Play a plan on these devices. Raises `PlanError` when it places a fragment on a worker that is not among them."""
    settings = training or Training()
    work = workload(dag)
    costs = Costs(
        work,
        tuple(devices),
        network or Network(),
        plan.schedule,
        settings.micro_batches,
        settings.optimizer_spec,
        settings.recompute,
        settings.clip,
    )
    index = {device.name: number for number, device in enumerate(devices)}
    for name in plan.placement:
        if name not in index:
            raise PlanError(f"the plan names worker {name}, which is not in the pool: {', '.join(index)}")
    encoded = messages(work, work.crossings(plan.cuts), plan.codecs)
    hosts = [index[name] for name in plan.placement]
    return simulate(
        costs,
        plan.cuts,
        hosts,
        plan.in_flight,
        encoded,
        weights_behind=plan.weights_behind,
        steps=steps,
        trace=trace,
    )


def compare(
    dag: OpDag,
    topology: Topology,
    training: Training | None = None,
    *,
    policies: Sequence[str] = tuple(POLICIES),
    codecs: Sequence[CodecName] = CODECS,
    own: CompressionSpec | None = None,
) -> list[dict[str, Any]]:
    """One plain dict for each policy and codec, in that order, ready for JSON; `own` is a job's own setting, if that is another.

    Keys: `policy`, `codec`, `step_seconds`, `bubble`, `bytes_per_link` (`"a -> b"` -> wire bytes per step),
    `memory_per_worker` (bytes), `placement` (worker of each fragment), `cuts`, `in_flight`, `weights_behind`, `wire_ratio` (tensor bytes over
    wire bytes of all crossings), `codecs_per_link` (`"a -> b"` -> the codec there and back, the ratio that was asked for and
    that on the wire), `simulated_steps` (1 where a pipeline is too long to play more; filling it counts then), `speedup` (over
    the faster one of `equal-ops` and `equal-compute` without a codec, where it was asked for) and `reason`: None, or why there
    is no plan, when the other figures are None or empty.
    """
    devices, network = from_topology(topology)
    asked = training or Training()
    compressions = [CompressionSpec(codec=codec, ratio=asked.ratio) for codec in codecs]
    if own is not None and codec_name(own) not in codecs:
        compressions.append(own)
    among = [taking_part(dag, devices, network, asked, each) for each in compressions]
    rows = [
        describe(dag, devices, network, asked, policy, each, among=groups)
        for policy in policies
        for each, groups in zip(compressions, among, strict=True)
    ]
    usual = [row["step_seconds"] for row in rows if row["policy"] in BASELINES and row["codec"] == "none"]
    fastest = min((seconds for seconds in usual if seconds), default=None)
    for each in rows:
        each["speedup"] = fastest / each["step_seconds"] if fastest and each["step_seconds"] else None
    return rows


def codec_name(compression: CompressionSpec) -> str:
    """What a person reads of a setting: the codec, or that of activations and that of gradients where a direction has its own."""
    if compression.forward is None and compression.backward is None:
        return compression.codec
    return f"{compression.forward or compression.codec}/{compression.backward or compression.codec}"


def describe(
    dag: OpDag,
    devices: Sequence[Device],
    network: Network,
    training: Training,
    policy: str,
    compression: CompressionSpec,
    *,
    among: Sequence[Devices] | None = None,
) -> dict[str, Any]:
    """Plan and simulate one policy and codec; one row of `compare`."""
    name = codec_name(compression)
    try:
        plan = plan_for(dag, devices, network, training, policy, compression, among=among)
    except PlanError as error:
        return row(policy, name, reason=str(error))
    steps = STEPS if training.micro_batches * len(plan.placement) <= MOST_PLAYED else 1
    played = simulate_plan(dag, plan, devices, network, training, steps=steps, trace=False)
    return row(policy, name, dag, plan, played) | {"simulated_steps": steps}


def row(
    policy: str,
    codec: str,
    dag: OpDag | None = None,
    plan: Plan | None = None,
    simulation: Simulation | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """A plan and its simulation as plain values."""
    found: dict[str, Any] = {
        "policy": policy,
        "codec": codec,
        "step_seconds": None,
        "bubble": None,
        "bytes_per_link": {},
        "memory_per_worker": {},
        "placement": [],
        "cuts": [],
        "in_flight": [],
        "weights_behind": [],
        "wire_ratio": None,
        "codecs_per_link": {},
        "simulated_steps": STEPS,
        "reason": reason,
    }
    if dag is None or plan is None or simulation is None:
        return found
    return found | {
        "step_seconds": simulation.step_seconds,
        "bubble": simulation.bubble,
        "bytes_per_link": {_arrow(*ends): round(size) for ends, size in simulation.bytes_per_link.items()},
        "memory_per_worker": {name: round(size) for name, size in simulation.memory_per_worker.items()},
        "placement": list(plan.placement),
        "cuts": list(plan.cuts),
        "in_flight": list(plan.in_flight),
        "weights_behind": list(plan.weights_behind),
        "wire_ratio": wire_ratio(dag, plan),
        "codecs_per_link": codecs_per_link(dag, plan),
    }


def wire_ratio(dag: OpDag, plan: Plan) -> float:
    """Tensor bytes over wire bytes, of all messages of a micro-batch; 1 without a codec or without a crossing."""
    raw, sent = _tensor_and_wire_bytes(dag, plan)
    return float(raw.sum() / sent.sum()) if sent.sum() else 1.0


def codecs_per_link(dag: OpDag, plan: Plan) -> dict[str, dict[str, Any]]:
    """For each pair of workers with a codec: its names, the nominal ratio (top-k keeps one value in so many), the wire ratio.

    The nominal ratio is the activations'; the gradients' where only they have a top-k; None where neither has.
    The edges of a pair have the same codec; the wire ratio counts them all, there and back.
    """
    crossings = workload(dag).crossings(plan.cuts)
    raw, sent = _tensor_and_wire_bytes(dag, plan)
    edges: dict[tuple[str, str], list[int]] = {}
    for edge in sorted(plan.codecs):
        edges.setdefault((plan.placement[crossings.source[edge]], plan.placement[crossings.target[edge]]), []).append(
            edge
        )
    return {
        _arrow(*ends): {
            "forward": plan.codecs[mine[0]].forward,
            "backward": plan.codecs[mine[0]].backward,
            "nominal_ratio": _nominal_ratio(plan.codecs[mine[0]]),
            "wire_ratio": float(raw[mine].sum() / sent[mine].sum()),
        }
        for ends, mine in edges.items()
        if ends[0] != ends[1]
    }


def _nominal_ratio(choice: CodecChoice) -> float | None:
    """What its top-k of activations, or else of gradients, was asked for; None where neither is one."""
    both = (parse(name, choice.options) for name in (choice.forward, choice.backward))
    return next((settings.ratio for settings in both if isinstance(settings, TopK)), None)


def _tensor_and_wire_bytes(dag: OpDag, plan: Plan) -> tuple[Floats, Floats]:
    """By edge, activations and gradients of one micro-batch: bytes of the tensors, and of their messages."""
    work = workload(dag)
    crossings = work.crossings(plan.cuts)
    moving = ~crossings.parameter
    returning = moving & crossings.gradient
    plain = messages(work, crossings, {})
    encoded = messages(work, crossings, plan.codecs)
    raw, sent = (moving * found.forward.size + returning * found.backward.size for found in (plain, encoded))
    return raw, sent


def _arrow(source: str, target: str) -> str:
    return f"{source} -> {target}"
