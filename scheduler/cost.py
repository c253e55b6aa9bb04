"""Cost model: how long a fragment takes on a device, and how much memory it needs under a schedule.

Time of an op is the larger of FLOPs / S and bytes moved / B, plus a fixed time per call. The first term is FusionLLM's
estimator (C_p = FLOPs / S(p)), also used with profiled times by Asteroid; the second covers what moves memory and
computes little. Memory is Asteroid's equation 3: model + optimiser + K * activations, K the micro-batches in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dag.workload import Crossings, Workload
from fusion.plan import ScheduleName
from fusion.spec import OptimizerSpec
from scheduler.cores import SharedCores, crowded
from scheduler.devices import Device, Network

Floats = NDArray[np.float64]

CALLS_PER_SPLIT = 6.0
CONVOLUTIONS_PER_SPLIT = 2.0
PASSES_PER_SPLIT = 5.0
"""What it costs to compute the gradients of an op's weights apart from its backward: so many operators' calls, or of
convolutions, and so many times the memory traffic of the op, as its operands have left the caches
(`benchmarks/split_backward.py`)."""
UPDATE_CALLS_PER_SLOT = 4
"""Operator calls that an update makes for each parameter and tensor of the optimiser's; without any it is one."""


@dataclass(frozen=True, eq=False)
class DeviceTimes:
    """Cumulative seconds over the body's ranks on one device (`size + 1` entries, the first 0)."""

    forward: Floats
    backward: Floats
    weights: Floats
    """The part of `backward` that can wait until nothing else is to be done."""
    splitting: Floats
    """What is added when it does wait."""

    @cached_property
    def both(self) -> Floats:
        return self.forward + self.backward


@dataclass(frozen=True, eq=False)
class Costs:
    """Everything a policy asks: the workload priced for these devices, links and training settings."""

    workload: Workload
    devices: tuple[Device, ...]
    network: Network
    schedule: ScheduleName
    micro_batches: int
    optimizer: OptimizerSpec
    recompute: bool = False
    clip: bool = False
    """Whether gradients are clipped: before their updates all workers wait for the norms of all fragments."""

    @cached_property
    def _times(self) -> dict[tuple[float, ...], DeviceTimes]:
        return {}

    def times(self, device: Device) -> DeviceTimes:
        """Cumulative forward and backward seconds of one micro-batch on `device`."""
        key = (
            device.flops_per_second,
            device.convolution_rate,
            device.traffic_rate,
            device.seconds_per_call,
            device.convolution_call,
        )
        found = self._times.get(key)
        if found is None:
            work = self.workload
            forward = _seconds(work.flops, work.convolution_flops, work.traffic, work.calls, device)
            backward = _seconds(
                work.backward_flops,
                work.backward_convolution_flops,
                work.backward_traffic,
                work.backward_calls,
                device,
            )
            weights = np.concatenate(([0.0], np.cumsum(np.diff(backward) * work.weights_share)))
            again = PASSES_PER_SPLIT * np.diff(work.traffic) / device.traffic_rate
            again += np.where(
                np.diff(work.convolution_flops) > 0,
                CONVOLUTIONS_PER_SPLIT * device.convolution_call,
                CALLS_PER_SPLIT * device.seconds_per_call,
            )
            splitting = np.concatenate(([0.0], np.cumsum(np.where(work.weights_share > 0, again, 0.0))))
            whole = backward + forward if self.recompute else backward
            found = self._times[key] = DeviceTimes(forward, whole, weights, splitting)
        return found

    def forward_seconds(self, device: Device, first: int, last: int) -> float:
        """One micro-batch's forward through `body[first:last]`."""
        forward = self.times(device).forward
        return float(forward[last] - forward[first]) + device.seconds_per_task

    def backward_seconds(self, device: Device, first: int, last: int) -> float:
        """One micro-batch's backward, with the repeated forward where activations are recomputed."""
        backward = self.times(device).backward
        return float(backward[last] - backward[first]) + device.seconds_per_task

    def weights_seconds(self, device: Device, first: int, last: int) -> float:
        """The part of that backward that others need not wait for, in a fragment that sends gradients."""
        weights = self.times(device).weights
        return float(weights[last] - weights[first])

    def splitting_seconds(self, device: Device, first: int, last: int) -> float:
        """What it costs to compute that part later."""
        splitting = self.times(device).splitting
        return float(splitting[last] - splitting[first])

    def update_seconds(self, device: Device, first: int, last: int) -> float:
        """The optimiser's update: it reads value, gradient and slots, and writes value and slots, in several calls for each."""
        held = float(self.workload.parameter_bytes[last] - self.workload.parameter_bytes[first])
        count = float(self.workload.parameters[last] - self.workload.parameters[first])
        slots = self.optimizer.slots
        calls = count * max(1, UPDATE_CALLS_PER_SLOT * slots)
        return held * (3 + 2 * slots) / device.traffic_rate + calls * device.seconds_per_call

    def step_seconds(self, device: Device, first: int, last: int) -> float:
        """What `device` computes for `body[first:last]` in one step, without waiting."""
        each = self.forward_seconds(device, first, last) + self.backward_seconds(device, first, last)
        return self.micro_batches * each + self.update_seconds(device, first, last)

    def longest(self, work: Mapping[int, float]) -> float:
        """Seconds until all devices are done with so many seconds of work each, of those that share cores by their part of them."""
        shared = (
            sum(work.get(device, 0.0) * cores for device, cores in each.demands.items()) / each.cores
            for each in self._crowded
        )
        return max((*work.values(), *shared))

    @cached_property
    def _crowded(self) -> list[SharedCores]:
        return crowded(self.devices)

    @cached_property
    def cumulative_state(self) -> Floats:
        """Cumulative bytes that don't depend on micro-batches: parameters, gradients, optimiser slots, buffers."""
        work = self.workload
        return work.parameter_bytes * (2 + self.optimizer.slots) + work.stored

    def state_bytes(self, first: int, last: int, borrowed: float = 0.0) -> float:
        """That of `body[first:last]`, with the value and gradient of `borrowed` bytes of parameters."""
        return float(self.cumulative_state[last] - self.cumulative_state[first]) + 2 * borrowed

    def micro_batch_bytes(self, first: int, last: int, incoming: float = 0.0) -> tuple[float, float]:
        """(bytes kept for each micro-batch in flight, bytes needed once while one is worked on)."""
        saved = float(self.workload.saved[last] - self.workload.saved[first])
        # Backward holds about as many bytes of gradients as the largest share of what was saved; one micro-batch at a time.
        return (incoming, saved) if self.recompute else (incoming + saved, 0.0)

    def waiting_bytes(self, first: int, last: int, incoming: float = 0.0) -> float:
        """Bytes kept for each micro-batch whose gradients of weights wait; 0 where there are none."""
        work = self.workload
        gradients = float(work.waiting[last] - work.waiting[first])
        return gradients + incoming + float(work.saved[last] - work.saved[first]) if gradients else 0.0

    def wire_bytes(self, crossings: Crossings) -> Floats:
        """Bytes of each edge's value as it is."""
        return self.workload.value_bytes[crossings.value].astype(np.float64)


def _seconds(flops: Floats, convolutions: Floats, traffic: Floats, calls: Floats, device: Device) -> Floats:
    convolving = np.diff(convolutions)
    computing = (np.diff(flops) - convolving) / device.flops_per_second + convolving / device.convolution_rate
    per_op = np.maximum(computing, np.diff(traffic) / device.traffic_rate)
    per_call = np.where(convolving > 0, device.convolution_call, device.seconds_per_call)
    return np.concatenate(([0.0], np.cumsum(per_op + np.diff(calls) * per_call)))
