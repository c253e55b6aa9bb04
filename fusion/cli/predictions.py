"""What a plan would do on a topology: the scheduler's plan, played through its simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dag.cut import cut
from dag.graph import OpDag
from dag.workload import workload
from fusion.cli.output import table
from fusion.errors import PlanError
from fusion.plan import Plan
from fusion.spec import JobSpec
from fusion.topology import Topology
from fusion.units import format_bytes, format_seconds
from scheduler import from_topology, plan_job
from scheduler.compression import message_bytes
from scheduler.cost import Costs
from scheduler.simulator import simulate

if TYPE_CHECKING:
    from rich.table import Table

Prediction = dict[str, Any]


def predict(dag: OpDag, spec: JobSpec, topology: Topology, *, policy: str, codec: str) -> Prediction:
    """One line of a comparison; `error` instead of figures when this policy finds no plan."""
    devices, network = from_topology(topology)
    train = spec.train
    compression = spec.compression.model_copy(update={"codec": codec})
    try:
        plan = plan_job(
            dag,
            devices,
            network,
            policy=policy,
            schedule=spec.plan.schedule,
            micro_batches=train.micro_batches,
            fragments=spec.plan.fragments,
            optimizer=train.optimizer,
            recompute=train.recompute,
            compression=compression,
            use_all=spec.plan.workers is not None,
            seed=train.seed,
        )
    except PlanError as error:
        return {"policy": policy, "codec": codec, "error": str(error)}
    work = workload(dag)
    costs = Costs(work, devices, network, plan.schedule, train.micro_batches, train.optimizer, train.recompute)
    index = {device.name: position for position, device in enumerate(devices)}
    hosts = [index[name] for name in plan.placement]
    wire = message_bytes(work, work.crossings(plan.cuts), plan.codecs)
    played = simulate(costs, plan.cuts, hosts, plan.in_flight, wire, clip=train.clip_grad_norm is not None, trace=False)
    return {
        "policy": policy,
        "codec": codec,
        "step_seconds": played.step_seconds,
        "bubble": played.bubble,
        "bytes_per_link": {f"{first} -> {second}": size for (first, second), size in played.bytes_per_link.items()},
        "memory_per_worker": played.memory_per_worker,
        "placement": list(plan.placement),
        "cuts": list(plan.cuts),
        "in_flight": list(plan.in_flight),
        "fragments": _fragments(dag, plan),
    }


def _fragments(dag: OpDag, plan: Plan) -> list[dict[str, Any]]:
    bounds = (0, *plan.cuts, len(dag.body))
    found = []
    for fragment, worker in zip(cut(dag, plan.cuts).fragments, plan.placement, strict=True):
        body = dag.body[bounds[fragment.index] : bounds[fragment.index + 1]]
        modules = [dag.ops[op].module for op in body if dag.ops[op].module] or [""]
        found.append(
            {
                "index": fragment.index,
                "worker": worker,
                "ops": len(body),
                "first_module": modules[0],
                "last_module": modules[-1],
                "parameter_bytes": sum(dag.ops[op].output_bytes for op in fragment.parameters),
                "flops": sum(dag.ops[op].flops for op in fragment.ops),
            }
        )
    return found


def comparison_table(predictions: Sequence[Prediction]) -> Table:
    """One row per policy and codec, the fastest first."""
    ordered = sorted(predictions, key=lambda prediction: prediction.get("step_seconds", float("inf")))
    rows = []
    for prediction in ordered:
        if "error" in prediction:
            rows.append((prediction["policy"], prediction["codec"], "-", "-", "-", "-", prediction["error"]))
            continue
        links: Mapping[str, float] = prediction["bytes_per_link"]
        rows.append(
            (
                prediction["policy"],
                prediction["codec"],
                format_seconds(prediction["step_seconds"]),
                f"{prediction['bubble']:.0%}",
                format_bytes(sum(links.values())),
                format_bytes(max(prediction["memory_per_worker"].values())),
                " ".join(prediction["placement"]),
            )
        )
    columns = ("policy", "codec", "step", "idle", "sent per step", "largest memory", "placement")
    return table(None, columns, rows, right=("step", "idle", "sent per step", "largest memory"))


def links_table(prediction: Prediction) -> Table:
    """Bytes of one step over each link."""
    rows = [(link, format_bytes(size)) for link, size in prediction["bytes_per_link"].items()]
    return table(None, ("link", "sent per step"), rows, right=("sent per step",))
