"""One fragment's graph, compiled: takes a micro-batch through it and says where its backward starts. Keeps no state of training.

So several threads may do so at the same time, each with parameters (or leaves that share their memory) of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dag.cut import Edge, Fragment
from dag.evaluation import evaluation_form
from dag.graph import OpDag
from dag.operators import torch_dtype
from executor.gradients import add_in_order
from executor.interpreter import Interpreter, Values
from executor.layout import Layouts, alone, arranged, arranged_like, layouts
from executor.postponed import PostponedWeights
from executor.storage import StorageGroups


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """What a forward gives: detached, contiguous values for the outgoing activation edges, and the loss where it is."""

    outputs: dict[int, Tensor]
    loss: float | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What one micro-batch is computed from: arrivals by edge, data by key, written buffers by op."""

    arrivals: Mapping[int, Tensor]
    data: Mapping[str, Tensor]
    buffers: Mapping[int, Tensor]
    postpone: bool = False
    """Whether the backward leaves the gradients of weights that can wait."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a forward keeps for its backward: roots in the order of `Passes._returning`, and (edge, leaf) pairs."""

    roots: list[Tensor]
    leaves: list[tuple[int, Tensor]]
    loss: Tensor | None
    postponed: PostponedWeights | None


class Passes:
    """Of `fragment`, on `device`; see `executor.program.FragmentProgram` for the other parameters.

    `bind` comes first. Raises `DagError` when the fragment's ops can't be built.
    """

    def __init__(
        self,
        dag: OpDag,
        fragment: Fragment,
        storage: StorageGroups,
        *,
        seed: int,
        micro_batches: int,
        device: torch.device,
    ) -> None:
        self._dag = dag
        self._fragment = fragment
        self._device = device
        # Values that go out, each with the edges that carry it, higher target first.
        self._outgoing = _by_value(edge for edge in fragment.outputs if edge.kind == "activation")
        self.lent = _by_value(edge for edge in fragment.outputs if edge.kind == "parameter")
        back = ((value, [e.index for e in edges if e.gradient]) for value, edges in (*self._outgoing, *self.lent))
        self._returning = [(value, edges) for value, edges in back if edges]
        lent = {value for value, _ in self.lent}
        self._aliased = tuple(value for value, _ in self._returning if value in lent)
        # The memory of these changes after the micro-batch, so what goes out is a copy.
        self._lasting = frozenset(value for value, _ in self._outgoing if storage.lasting(value))
        self._written_data = frozenset(op for op in fragment.placeholders if storage.written(op))

        crossing = [edge for edge in (*fragment.inputs, *fragment.outputs) if edge.kind == "activation"]
        self._layouts = layouts(dag) if crossing else Layouts({}, {})
        self._loss = dag.loss.id if fragment.has_loss else None
        ones = torch.ones(dag.loss.meta.shape, dtype=torch_dtype(dag.loss.meta.dtype), device=self._device)
        self._loss_gradient = ones / micro_batches  # what `(loss / micro_batches).backward()` hands to the loss

        self._cached = tuple(op for op in fragment.ops if op in dag.constant and not storage.written(op))
        cached = frozenset(self._cached)
        ops = [dag.ops[op] for op in fragment.ops if op not in cached]
        body = [op for op in ops if op.only_in != "evaluation"]
        evaluated = [form for op in ops if (form := evaluation_form(op, dag)) is not None]
        arriving = (edge.value for edge in fragment.inputs)
        given = (
            *fragment.parameters,
            *fragment.written_buffers,
            *fragment.constants,
            *fragment.placeholders,
            *arriving,
            *self._cached,
        )
        kept = [value for value, _ in self._outgoing] + ([] if self._loss is None else [self._loss])
        self._constants = Interpreter(
            [dag.ops[op] for op in self._cached], fragment.constants, self._cached, device=self._device
        )
        watched = [op for op, _ in fragment.postponed]
        self._training = Interpreter(
            body, given, kept, device=self._device, job_seed=seed, numbers=dag.numbers, watched=watched
        )
        self._evaluating = Interpreter(
            evaluated, given, kept, device=self._device, job_seed=seed, numbers=dag.numbers, evaluation=True
        )
        evaluation_writes = {target for op in evaluated for target in op.mutates}
        self._scratch = frozenset(
            buffer for buffer in fragment.written_buffers if not evaluation_writes.isdisjoint(storage.members(buffer))
        )

    def bind(self, values: dict[int, Tensor]) -> None:
        """These are the values of the ops that the fragment stores: parameters, buffers and constants."""
        for op_id in self._fragment.constants:
            self._constants.bind(op_id, values[op_id])
        computed = self._constants.fresh()
        with torch.no_grad():
            self._constants.run(computed, 0, 0)
        cached = {op_id: computed[self._constants.slot[op_id]] for op_id in self._cached}
        for op_id, value in (values | cached).items():
            self._training.bind(op_id, value)
            self._evaluating.bind(op_id, value)

    def differentiable(
        self, step: int, micro_batch: int, inputs: Inputs, parameters: Mapping[int, Tensor]
    ) -> tuple[Values, Pass]:
        """Run the training ops under autograd, for the gradients of `parameters`."""
        training = self._training
        values = training.fresh()
        for op, parameter in parameters.items():
            if op in training.slot:
                values[training.slot[op]] = parameter
        leaves: list[tuple[int, Tensor]] = []
        with torch.enable_grad():
            self._feed(training, values, inputs)
            for edge in self._fragment.inputs:
                if edge.gradient:
                    slot = training.slot[edge.value]
                    leaf = values[slot] = values[slot].detach().requires_grad_()
                    leaves.append((edge.index, leaf))
            for op in self._aliased:
                values[training.slot[op]] = parameters[op].view_as(parameters[op])
            postponed = None
            if inputs.postpone and self._fragment.postponed:
                postponed = PostponedWeights(
                    {op: tuple(parameters[p] for p in waiting) for op, waiting in self._fragment.postponed}
                )
            training.run(values, step, micro_batch, None if postponed is None else postponed.watch)
        roots = [values[training.slot[value]] for value, _ in self._returning]
        loss = None if self._loss is None else values[training.slot[self._loss]]
        return values, Pass(roots, leaves, loss, postponed)

    def begin_of_backward(
        self, kept: Pass, gradients: Mapping[int, Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What autograd starts from, and the gradients of these."""
        roots: list[Tensor] = []
        root_gradients: list[Tensor] = []
        if kept.loss is not None and kept.loss.requires_grad:
            roots.append(kept.loss)
            root_gradients.append(self._loss_gradient)
        for root, (value, edges) in zip(kept.roots, self._returning, strict=True):
            gradient = add_in_order([self._here(g) for edge in edges if (g := gradients[edge]) is not None])
            if gradient is not None and root.requires_grad:
                roots.append(root)
                layout = self._layouts.gradients.get(value)
                root_gradients.append(arranged_like(gradient, root) if layout is None else arranged(gradient, layout))
        return roots, root_gradients

    def _feed(self, interpreter: Interpreter, values: Values, inputs: Inputs) -> None:
        slot = interpreter.slot
        for op, buffer in inputs.buffers.items():
            values[slot[op]] = buffer
        for op in self._fragment.placeholders:
            value = self._here(inputs.data[self._dag.ops[op].target])
            values[slot[op]] = value.clone() if op in self._written_data else value
        for edge in self._fragment.inputs:
            arrival = self._here(inputs.arrivals[edge.index])
            values[slot[edge.value]] = arranged(arrival, self._layouts.values.get(edge.value))

    def evaluate(self, step: int, batch: int, inputs: Inputs) -> ForwardResult:
        """One evaluation batch, in evaluation form and without gradients; buffers stay as they are."""
        buffers = {op: value.clone() if op in self._scratch else value for op, value in inputs.buffers.items()}
        with torch.no_grad():
            values = self._evaluating.fresh()
            self._feed(self._evaluating, values, replace(inputs, buffers=buffers))
            self._evaluating.run(values, step, batch)
            # Who reads other values than in training may share memory in another way.
            lasting = {op for op, _ in self._outgoing} if self._dag.rewired else self._lasting
            return self._result(self._evaluating, values, lasting)

    def result(self, values: Values) -> ForwardResult:
        """What is to be told of a training pass with these values."""
        return self._result(self._training, values, self._lasting)

    def _result(self, interpreter: Interpreter, values: Values, lasting: Set[int]) -> ForwardResult:
        outputs: dict[int, Tensor] = {}
        for op, edges in self._outgoing:
            if op in interpreter.slot:
                value = values[interpreter.slot[op]]
            else:
                # In training alone: nobody reads in evaluation what the edge brings.
                meta = self._dag.ops[op].meta
                value = torch.zeros(meta.shape, dtype=torch_dtype(meta.dtype), device=self._device)
            value = value.detach().clone(memory_format=torch.contiguous_format) if op in lasting else alone(value)
            outputs.update((edge.index, value) for edge in edges)
        loss = None if self._loss is None else float(values[interpreter.slot[self._loss]].item())
        return ForwardResult(outputs, loss)

    def _here(self, tensor: Tensor) -> Tensor:
        """The tensor on this fragment's device."""
        if tensor.device == self._device:
            return tensor
        return tensor.to(self._device, non_blocking=True)


def _by_value(edges: Iterable[Edge]) -> list[tuple[int, list[Edge]]]:
    """Edges grouped by the value they carry, values ascending, higher target first."""
    groups: dict[int, list[Edge]] = {}
    for edge in sorted(edges, key=lambda edge: (edge.value, -edge.target)):
        groups.setdefault(edge.value, []).append(edge)
    return list(groups.items())
