"""The real planner: the scheduler's `plan_job` over what the candidates said of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import scheduler
from coordinator.plans.link_estimates import network_of, reachable
from coordinator.plans.planning import Candidate, Planner
from dag.graph import OpDag
from dag.workload import workload
from fusion.errors import PlanError
from fusion.messages import TrainConfig
from fusion.plan import Plan
from fusion.spec import JobSpec
from fusion.topology import Topology


def scheduler_planner(topology: Topology | None = None, *, relative_speeds: bool = False) -> Planner:
    """A planner for a pool; `topology` names the links between its workers (all alike without it).

    With `relative_speeds` its speeds are those of the workers to each other, as in local mode, where each is slowed down to
    its share of what this machine measures.
    """
    return SchedulerPlanner(topology, relative_speeds=relative_speeds)


class SchedulerPlanner:
    """Makes plans, and prices them."""

    def __init__(self, topology: Topology | None = None, *, relative_speeds: bool = False) -> None:
        self._relative = relative_speeds
        known, self._network = scheduler.from_topology(topology) if topology is not None else ((), scheduler.Network())
        self._described = {device.name: device for device in known}

    def __call__(
        self,
        dag: OpDag,
        candidates: Sequence[Candidate],
        spec: JobSpec,
        train: TrainConfig,
        previous: Plan | None,
    ) -> Plan:
        candidates = reachable(candidates)
        devices, network = self._devices(candidates), self._links(candidates)
        if previous is None:
            asked = _training(spec, train)
            return scheduler.plan_for(dag, devices, network, asked, spec.plan.policy, spec.compression)
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
            clip=train.clip_grad_norm is not None,
            compression=spec.compression,
            cuts=previous.cuts,
            codecs=previous.codecs,
            seed=train.seed,
        )

    def price(
        self, dag: OpDag, candidates: Sequence[Candidate], spec: JobSpec, train: TrainConfig, plan: Plan
    ) -> float | None:
        """The simulated step time of `plan`; None when one of its workers is not a candidate, or lacks memory."""
        devices = self._devices(candidates)
        training = replace(_training(spec, train), schedule=plan.schedule)
        try:
            played = scheduler.simulate_plan(dag, plan, devices, self._links(candidates), training, trace=False)
        except PlanError:
            return None
        limits = {device.name: device.memory_bytes for device in devices}
        if any(used > (limits[name] or used) for name, used in played.memory_per_worker.items()):
            return None
        return played.step_seconds

    def work_seconds(
        self, dag: OpDag, candidates: Sequence[Candidate], train: TrainConfig, plan: Plan
    ) -> tuple[float, ...]:
        """Of one step, by fragment: forward and backward of every micro-batch, and the update."""
        devices = {device.name: device for device in self._devices(candidates)}
        costs = scheduler.Costs(
            workload(dag),
            tuple(devices.values()),
            self._network,
            plan.schedule,
            train.micro_batches,
            train.optimizer,
            train.recompute,
        )
        return tuple(
            costs.step_seconds(devices[worker], first, last)
            for worker, (first, last) in zip(
                plan.placement, pairwise((0, *plan.cuts, costs.workload.size)), strict=True
            )
        )

    def _devices(self, candidates: Sequence[Candidate]) -> list[scheduler.Device]:
        # Workers of local mode measure the same processor, each with its own error.
        fastest = max(candidates, key=lambda each: each.device.flops_per_second, default=None)
        plain = [self._device(candidate, fastest or candidate) for candidate in candidates]
        placed = [_on_its_processor(device, each) for device, each in zip(plain, candidates, strict=True)]
        crowded = {index for shared in scheduler.crowded(placed) for index in shared.demands}
        # Elsewhere it is of no account on which machine a worker is, and like ones are to look alike.
        return [placed[index] if index in crowded else device for index, device in enumerate(plain)]

    def _device(self, candidate: Candidate, fastest: Candidate) -> scheduler.Device:
        device = self._described.get(candidate.name) or _measured(candidate)
        if self._relative and candidate.name in self._described:
            times = max(each.flops_per_second for each in self._described.values()) / device.flops_per_second
            room = [each for each in (device.memory_bytes, candidate.device.memory_bytes) if each]
            device = replace(
                _resting(fastest, times),
                name=device.name,
                region=device.region,
                # What the file says is the limit of the whole process: its libraries are in there, too.
                memory_bytes=min(room, default=None),
                cores=device.cores / times,
            )
        return device.slowed(candidate.slower) if candidate.slower != 1 else device

    def _links(self, candidates: Sequence[Candidate]) -> scheduler.Network:
        return network_of(candidates, self._network, self._described)


def _training(spec: JobSpec, train: TrainConfig) -> scheduler.Training:
    return scheduler.Training(
        micro_batches=train.micro_batches,
        schedule=spec.plan.schedule,
        optimizer=train.optimizer,
        recompute=train.recompute,
        clip=train.clip_grad_norm is not None,
        fragments=spec.plan.fragments,
        workers=spec.plan.workers,
        seed=train.seed,
    )


def _resting(candidate: Candidate, times: float) -> scheduler.Device:
    """The worker, resting after each task until that has taken so many times as long. What it needs to get going again is
    part of the next task, and rested for as well.
    """
    device = _measured(candidate)
    if times > 1:
        device = replace(device, seconds_per_task=device.seconds_per_task + candidate.device.seconds_after_rest)
    return device.slowed(times)


def _on_its_processor(device: scheduler.Device, candidate: Candidate) -> scheduler.Device:
    """The device as one of those that share its cores, or its GPU, and find others' values in the caches."""
    said = candidate.device
    if not said.processor:
        return device
    cores, threads = (said.cores, said.threads) if said.kind == "cpu" else (1, 1)
    if said.kind == "cpu" and device.cores == 1.0:  # who rests has that in its tasks already
        cold = said.seconds_after_rest or scheduler.SECONDS_OF_COLD_CACHES
        device = replace(device, seconds_per_task=device.seconds_per_task + cold)
    return replace(
        device, processor=scheduler.Processor(said.processor, cores), cores=min(threads, cores) * device.cores
    )


def _measured(candidate: Candidate) -> scheduler.Device:
    """What the worker measured, or was declared to do; 0 means neither, and then the scheduler's default or no limit holds."""
    said, memory = candidate.device, candidate.device.memory_bytes or None
    if said.declared and said.flops_per_second > 0:
        return scheduler.Device(candidate.name, flops_per_second=said.flops_per_second, memory_bytes=memory)
    return scheduler.measured(
        candidate.name,
        said.flops_per_second,
        memory,
        convolution_speed=said.convolution_flops_per_second,
        bytes_per_second=said.bytes_per_second,
        training_share=said.training_share,
        seconds_per_call=said.seconds_per_call,
        convolution_share=said.convolution_share,
        seconds_per_convolution=said.seconds_per_convolution,
    )
