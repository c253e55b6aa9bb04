"""The real planner: the scheduler's `plan_job` over what the candidates said of themselves."""

from __future__ import annotations

from collections.abc import Sequence

import scheduler
from coordinator.planning import Candidate, Planner
from dag.graph import OpDag
from fusion.messages import TrainConfig
from fusion.plan import Plan
from fusion.spec import JobSpec
from fusion.topology import Topology


def scheduler_planner(topology: Topology | None = None) -> Planner:
    """A planner for a pool; `topology` names the links between its workers (all alike without it)."""
    known, network = scheduler.from_topology(topology) if topology is not None else ((), scheduler.Network())
    described = {device.name: device for device in known}

    def plan(
        dag: OpDag,
        candidates: Sequence[Candidate],
        spec: JobSpec,
        train: TrainConfig,
        previous: Plan | None,
    ) -> Plan:
        devices = [described.get(candidate.name) or _device(candidate) for candidate in candidates]
        return scheduler.plan_job(
            dag,
            devices,
            network,
            policy=spec.plan.policy,
            schedule=spec.plan.schedule,
            micro_batches=train.micro_batches,
            fragments=spec.plan.fragments,
            optimizer=train.optimizer,
            recompute=train.recompute,
            compression=spec.compression,
            cuts=None if previous is None else previous.cuts,
            codecs=None if previous is None else previous.codecs,
            # Asked for by number, so all of them are to take part; otherwise the policy may leave slow ones out.
            use_all=spec.plan.workers is not None and previous is None,
            seed=train.seed,
        )

    return plan


def _device(candidate: Candidate) -> scheduler.Device:
    """What the worker measured; 0 means that it did not, and then the scheduler's default or no limit holds."""
    said = candidate.device
    memory = said.memory_bytes or None
    if said.flops_per_second > 0:
        return scheduler.Device(candidate.name, flops_per_second=said.flops_per_second, memory_bytes=memory)
    return scheduler.Device(candidate.name, memory_bytes=memory)
