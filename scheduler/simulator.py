"""Plays a plan through discrete events: the executor's own task boards, devices that run one task at a time, queued links.

A directed pair of workers is one serial link: a message waits for those before it, takes bytes / rate on the link, and
arrives a latency later. A worker encodes on one thread and decodes on another, beside its compute. Workers on a processor with
too few cores for all of them share these (`scheduler.cores`). What runs when is decided by `executor.board.TaskBoard`, the same
class that runs in a worker.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Literal

from dag.cut import Edge, Fragment, Partition
from dag.graph import TensorMeta
from dag.workload import Crossings, Workload
from executor.board import TaskBoard
from executor.ordering import Task, TaskKind
from fusion.errors import PlanError
from fusion.wire import FrameKind
from scheduler.cores import SharedCores, crowded
from scheduler.cost import Costs
from scheduler.estimate import Estimator, Placed
from scheduler.memory import FragmentMemory, fit_behind, fragment_memory, worker_memory
from scheduler.messages import Messages
from scheduler.simulation import Simulation, Span

STEPS = 3
"""Steps to play: the first fills the pipeline, the others are counted."""
_SOMETHING = ((-1, ()),)
"""Stands in an outline for the ops that postpone the gradients of their weights."""


def simulate(
    costs: Costs,
    cuts: Sequence[int],
    devices: Sequence[int],
    in_flight: Sequence[int],
    messages: Messages,
    *,
    weights_behind: Sequence[int] | None = None,
    steps: int = STEPS,
    trace: bool = True,
) -> Simulation:
    """Play `steps` steps of a placement (`devices[i]`: index in `costs.devices` of fragment i's host).

    `weights_behind` is by default as deep as fits. `trace` False leaves `spans` empty.
    Raises `PlanError` if the tasks block each other, which no plan made here does.
    """
    crossings = costs.workload.crossings(tuple(cuts))
    memory = fragment_memory(costs, cuts, devices, crossings)
    if weights_behind is None:
        weights_behind = fit_behind(costs, memory, devices, in_flight)
    depths = (tuple(in_flight), tuple(weights_behind))
    run = _Run(costs, tuple(cuts), tuple(devices), depths, crossings, memory, messages, steps, trace)
    run.play()
    return run.result()


def play(
    costs: Costs,
    estimate: Estimator,
    placed: Placed,
    in_flight: Sequence[int],
    *,
    weights_behind: Sequence[int] | None = None,
    steps: int = 2,
) -> Simulation:
    """A short simulation without spans, for searching; a single step includes filling the pipeline."""
    crossings = costs.workload.crossings(placed.cuts)
    encoded = estimate.encoding(placed, crossings)
    return simulate(
        costs,
        placed.cuts,
        placed.devices,
        in_flight,
        encoded,
        weights_behind=weights_behind,
        steps=steps,
        trace=False,
    )


def outline(workload: Workload, crossings: Crossings, postponing: Sequence[bool]) -> Partition:
    """A partition with fragments and edges but without their ops: all that a task board looks at."""
    fragments = len(postponing)
    nothing = TensorMeta((), "float32")
    edges = tuple(
        Edge(
            index,
            int(crossings.value[index]),
            int(crossings.source[index]),
            int(crossings.target[index]),
            "parameter" if crossings.parameter[index] else "activation",
            workload.metas[crossings.value[index]] or nothing,
            bool(crossings.gradient[index]),
        )
        for index in range(len(crossings))
    )
    inputs: list[list[Edge]] = [[] for _ in range(fragments)]
    outputs: list[list[Edge]] = [[] for _ in range(fragments)]
    for edge in edges:
        outputs[edge.source].append(edge)
        inputs[edge.target].append(edge)
    return Partition(
        (),
        tuple(
            Fragment(
                index,
                *((),) * 6,
                inputs=tuple(inputs[index]),
                outputs=tuple(outputs[index]),
                has_loss=index == fragments - 1,
                postponed=_SOMETHING if postponing[index] else (),
            )
            for index in range(fragments)
        ),
        edges,
    )


def _postponing(workload: Workload, cuts: Sequence[int], crossings: Crossings) -> list[bool]:
    """Which fragments can leave gradients of weights for later: those that send gradients and have ops that can."""
    answering = set(crossings.target[crossings.gradient & ~crossings.parameter].tolist())
    spans = pairwise((0, *cuts, workload.size))
    return [
        index in answering and bool(workload.weights_share[first:last].any())
        for index, (first, last) in enumerate(spans)
    ]


@dataclass(frozen=True, slots=True)
class _Message:
    """A message under way to the device `target`; `index` is its edge, or the fragment whose norms it brings."""

    target: int
    kind: FrameKind
    index: int
    step: int
    micro_batch: int
    decode: float
    """Seconds that decoding still takes."""


class _Run:
    """One simulation in progress."""

    def __init__(
        self,
        costs: Costs,
        cuts: tuple[int, ...],
        devices: tuple[int, ...],
        depths: tuple[tuple[int, ...], tuple[int, ...]],
        crossings: Crossings,
        memory: Sequence[FragmentMemory],
        messages: Messages,
        steps: int,
        trace: bool,
    ) -> None:
        self._costs = costs
        self._cuts = cuts
        self._hosts = devices
        in_flight, weights_behind = depths
        self._memory = worker_memory(memory, devices, in_flight, weights_behind)
        self._ways = {FrameKind.ACTIVATION: messages.forward.edges(), FrameKind.GRADIENT: messages.backward.edges()}
        self._clip = costs.clip
        self._steps = steps
        self._trace = trace
        self._names = [device.name for device in costs.devices]
        self._partition = outline(costs.workload, crossings, _postponing(costs.workload, cuts, crossings))
        self._used = tuple(dict.fromkeys(devices))
        self._boards = {
            device: TaskBoard(
                self._partition,
                [index for index, host in enumerate(devices) if host == device],
                schedule=costs.schedule,
                micro_batches=costs.micro_batches,
                in_flight=in_flight,
                steps=steps,
                clip=costs.clip,
                weights_behind=weights_behind,
            )
            for device in self._used
        }
        self._seconds = self._durations()
        self._events: list[tuple[float, int, int, Task | None]] = []
        self._order = count()
        self._running: dict[int, bool] = dict.fromkeys(self._used, False)
        # WEIGHTS give way to what becomes ready: by device, the ones that run with the serial number and time of their
        # end; by task, what is left of those that were interrupted.
        self._yielding: dict[int, tuple[Task, int, float]] = {}
        self._left: dict[Task, float] = {}
        # Where cores are shared nobody knows an end when a task begins: by device, its cores, and what runs since when; by
        # processor, the serial number of the event for who is done first.
        self._shared = {device: shared for shared in crowded(costs.devices, self._used) for device in shared.demands}
        self._sharing: dict[int, tuple[Task, float]] = {}
        self._due: dict[SharedCores, int] = {}
        self._link_free: dict[tuple[int, int], float] = {}
        # A worker has one thread that encodes and one that takes messages in; both run beside its compute thread.
        self._encoder_free: dict[int, float] = {}
        self._decoder_free: dict[int, float] = {}
        self._sent: dict[tuple[int, int], float] = {}
        self._busy: dict[int, float] = dict.fromkeys(self._used, 0.0)
        self._messages: dict[int, _Message] = {}
        self._step_ends = [0.0] * (steps + 1)
        self._spans: list[Span] = []

    def _durations(self) -> list[dict[TaskKind, float]]:
        costs = self._costs
        found = []
        spans = pairwise((0, *self._cuts, costs.workload.size))
        for index, (host, span) in enumerate(zip(self._hosts, spans, strict=True)):
            device = costs.devices[host]
            apart = self._boards[host].postpones(index)
            weights = costs.weights_seconds(device, *span) if apart else 0.0
            found.append(
                {
                    TaskKind.FORWARD: costs.forward_seconds(device, *span),
                    TaskKind.BACKWARD: costs.backward_seconds(device, *span) - weights,
                    TaskKind.WEIGHTS: weights + costs.splitting_seconds(device, *span) if apart else 0.0,
                    TaskKind.UPDATE: costs.update_seconds(device, *span),
                }
            )
        return found

    def play(self) -> None:
        for edge in self._partition.edges:
            if edge.kind == "parameter":
                self._send(0.0, edge, FrameKind.ACTIVATION, 1, 0)
        for device in self._used:
            self._start(0.0, device)
        while self._events:
            time, serial, device, task = heapq.heappop(self._events)
            if task is None:
                if not self._taken_in(time, serial):
                    continue
                self._interrupt(time, device)
            elif device in self._shared:
                if self._due.get(self._shared[device]) != serial:
                    continue  # others have begun or ended since
                self._ended_sharing(time, device)
                self._finish(time, device, task)
            elif task.kind is TaskKind.WEIGHTS and self._yielding.get(device, (task, -1))[1] != serial:
                continue  # was interrupted
            else:
                self._finish(time, device, task)
            if not self._running[device]:
                self._start(time, device)
        stuck = [self._names[device] for device, board in self._boards.items() if not board.finished]
        if stuck:
            raise PlanError(f"the plan's tasks block each other on {', '.join(stuck)}")

    def _start(self, time: float, device: int) -> None:
        task = self._boards[device].next_task()
        if task is None:
            return
        seconds = self._left.pop(task, self._seconds[task.fragment][task.kind])
        self._running[device] = True
        shared = self._shared.get(device)
        if shared is not None:
            shared.start(time, device, seconds)
            self._sharing[device] = (task, time)
            if task.kind is TaskKind.WEIGHTS:
                self._yielding[device] = (task, -1, 0.0)
            self._await_first(shared)
        else:
            self._busy[device] += seconds
            serial = next(self._order)
            if task.kind is TaskKind.WEIGHTS:
                self._yielding[device] = (task, serial, time + seconds)
            heapq.heappush(self._events, (time + seconds, serial, device, task))
        if self._trace:
            self._spans.append(
                Span(
                    self._names[device],
                    task.kind.value,  # type: ignore[arg-type]
                    task.fragment,
                    task.step,
                    task.micro_batch,
                    time,
                    time + seconds,
                )
            )

    def _interrupt(self, time: float, device: int) -> None:
        """Something has arrived: WEIGHTS make way for what may run now. A worker does so between their ops."""
        if device not in self._yielding:
            return
        task, _, end = self._yielding[device]
        if self._boards[device].next_task() == task:
            return
        del self._yielding[device]
        self._running[device] = False
        if device in self._shared:
            self._left[task] = self._ended_sharing(time, device)
            return
        self._left[task] = end - time
        self._busy[device] -= end - time
        self._end_span(time, device)

    def _await_first(self, shared: SharedCores) -> None:
        """The next event of this processor: the end of what is done first, as things stand."""
        first = shared.next_end()
        if first is not None:
            end, device = first
            serial = self._due[shared] = next(self._order)
            heapq.heappush(self._events, (end, serial, device, self._sharing[device][0]))

    def _ended_sharing(self, time: float, device: int) -> float:
        """What it ran is done, or has to wait: the seconds that are left of it."""
        shared = self._shared[device]
        left = shared.stop(time, device)
        _, began = self._sharing.pop(device)
        self._busy[device] += time - began
        self._end_span(time, device)
        self._await_first(shared)
        return left

    def _end_span(self, time: float, device: int) -> None:
        """What it runs, the last of its spans, is over now."""
        if self._trace:
            name = self._names[device]
            index = next(i for i in reversed(range(len(self._spans))) if self._spans[i].resource == name)
            self._spans[index] = replace(self._spans[index], end=time)

    def _finish(self, time: float, device: int, task: Task) -> None:
        self._running[device] = False
        if task.kind is TaskKind.WEIGHTS:
            del self._yielding[device]
        self._boards[device].completed(task)
        self._step_ends[task.step] = max(self._step_ends[task.step], time)
        fragment = self._partition.fragments[task.fragment]
        if task.kind is TaskKind.FORWARD:
            for edge in fragment.outputs:
                if edge.kind == "activation":
                    self._send(time, edge, FrameKind.ACTIVATION, task.step, task.micro_batch)
        elif task.kind is TaskKind.BACKWARD:
            for edge in fragment.inputs:
                if edge.gradient:
                    self._send(time, edge, FrameKind.GRADIENT, task.step, task.micro_batch)
        elif task.kind is TaskKind.UPDATE and task.step < self._steps:
            for edge in fragment.outputs:
                if edge.kind == "parameter":
                    self._send(time, edge, FrameKind.ACTIVATION, task.step + 1, 0)
        if self._clip and self._boards[device].completes_gradients(task):
            for other in self._used:
                norms = _Message(other, FrameKind.NORMS, task.fragment, task.step, 0, 0.0)
                self._deliver(time, device, norms, 256.0)

    def _taken_in(self, time: float, serial: int) -> bool:
        """A message has come over the link, or has been decoded: hand it on, or decode it first."""
        message = self._messages.pop(serial)
        if not message.decode:
            self._boards[message.target].arrived(message.kind, message.index, message.step, message.micro_batch)
            return True
        begin = max(time, self._decoder_free.get(message.target, 0.0))
        end = self._decoder_free[message.target] = begin + message.decode
        self._messages[serial] = replace(message, decode=0.0)
        heapq.heappush(self._events, (end, serial, message.target, None))
        self._codec_span("decode", message.target, message, begin, end)
        return False

    def _send(self, time: float, edge: Edge, kind: FrameKind, step: int, micro_batch: int) -> None:
        source, target = edge.source, edge.target
        if kind is FrameKind.GRADIENT:
            source, target = target, source
        size, encode, decode = self._ways[kind][edge.index]
        message = _Message(self._hosts[target], kind, edge.index, step, micro_batch, decode)
        self._deliver(time, self._hosts[source], message, size, encode)

    def _deliver(self, time: float, source: int, message: _Message, size: float, encode: float = 0.0) -> None:
        target = message.target
        if source == target:
            self._boards[source].arrived(message.kind, message.index, message.step, message.micro_batch)
            return
        if encode:
            start = max(time, self._encoder_free.get(source, 0.0))
            time = self._encoder_free[source] = start + encode
            self._codec_span("encode", source, message, start, time)
        link = self._costs.network.link(self._names[source], self._names[target])
        begin = max(time, self._link_free.get((source, target), 0.0))
        end = begin + size / link.bytes_per_second
        self._link_free[source, target] = end
        self._sent[source, target] = self._sent.get((source, target), 0.0) + size
        serial = next(self._order)
        self._messages[serial] = message
        heapq.heappush(self._events, (end + link.seconds, serial, target, None))
        if self._trace:
            resource = f"{self._names[source]} → {self._names[target]}"
            self._spans.append(
                Span(resource, *self._about(message), message.step, message.micro_batch, begin, end, size)
            )

    def _codec_span(
        self, kind: Literal["encode", "decode"], device: int, message: _Message, begin: float, end: float
    ) -> None:
        if self._trace:
            _, fragment = self._about(message)
            resource = f"{self._names[device]} {kind}r"
            self._spans.append(Span(resource, kind, fragment, message.step, message.micro_batch, begin, end))

    def _about(self, message: _Message) -> tuple[Literal["activation", "gradient", "parameter", "norms"], int]:
        """What a message is, and the fragment that gets it."""
        if message.kind is FrameKind.NORMS:
            return "norms", message.index
        edge = self._partition.edges[message.index]
        return ("gradient", edge.source) if message.kind is FrameKind.GRADIENT else (edge.kind, edge.target)

    def result(self) -> Simulation:
        steps = self._steps
        step_seconds = self._step_ends[1]
        if steps > 1:
            step_seconds = (self._step_ends[steps] - self._step_ends[1]) / (steps - 1)
        busy = {self._names[device]: seconds / steps for device, seconds in self._busy.items()}
        computing = sum(busy.values()) / len(busy)
        return Simulation(
            step_seconds=step_seconds,
            bubble=max(0.0, 1 - computing / step_seconds) if step_seconds > 0 else 0.0,
            bytes_per_link={
                (self._names[source], self._names[target]): size / steps
                for (source, target), size in sorted(self._sent.items())
            },
            memory_per_worker={self._names[device]: held for device, held in self._memory.items()},
            busy_per_worker=busy,
            spans=tuple(self._spans),
        )
