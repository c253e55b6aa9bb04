"""A fragment that runs: built from data alone, it computes forward, backward, update and evaluation of its ops.

Remote automatic differentiation: each fragment differentiates its own piece. What arrives becomes a leaf of autograd
(`detach().requires_grad_()`, sharing the arrival's memory, never writing to it); the gradients that arrive for what it
sent become the roots' gradients; what autograd leaves in the leaves goes back to the fragments before.

The sums come out as one big backward would make them. Autograd adds the contributions to a value from its last use to its
first, and uses in later fragments come after the local ones. So the contributions that arrive are added first, higher
fragment first, and autograd joins the local ones. A parameter that other fragments borrow enters each micro-batch as a
view of itself, which takes part as a root: its gradient of one micro-batch is complete before it is added to `.grad`.

Where other fragments wait for what a backward gives, it may leave the gradients of weights for `weights`
(`executor.postponed`). A replay, which has what comes forward and what comes back at hand, may run micro-batches `whole`,
several at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import thread_time

import torch
from torch import Tensor

from dag.cut import Fragment
from dag.graph import OpDag
from dag.operators import meta_of
from executor import clipping, snapshot
from executor.gradients import own_gradients
from executor.layout import alone
from executor.learning_rate import factor
from executor.optimizers import FragmentOptimizer
from executor.passes import ForwardResult, Inputs, Pass, Passes
from executor.postponed import PostponedWeights
from executor.storage import StorageGroups
from fusion.errors import BlobError
from fusion.spec import LrScheduleSpec, OptimizerSpec


@dataclass(frozen=True, slots=True)
class Whole:
    """What one micro-batch gives, forward and back; the gradients of parameters, by op, are not added to others' yet."""

    forward: ForwardResult
    returned: dict[int, Tensor | None]
    gradients: dict[int, Tensor | None]
    forward_seconds: float
    """Of its thread's own time: what it waited for others beside it is none of the fragment's slowness."""
    backward_seconds: float


class FragmentProgram:
    """One fragment of `dag`, with its parameters, buffers and optimizer, on one device.

    `micro_batches` is the number per step: the loss of each counts 1 / micro_batches. With `recompute`, a forward keeps
    only its inputs and the backward runs it again, with the same seeds and the buffers as they were.
    Raises `DagError` when the fragment's ops can't be built.
    """

    def __init__(
        self,
        dag: OpDag,
        fragment: Fragment,
        *,
        seed: int,
        micro_batches: int,
        optimizer: OptimizerSpec,
        lr_schedule: LrScheduleSpec,
        steps: int,
        clip_grad_norm: float | None = None,
        device: str = "cpu",
        recompute: bool = False,
    ) -> None:
        self.fragment = fragment
        self._dag = dag
        self._device = _indexed(torch.device(device))
        self._recompute = recompute
        self._optimizer_spec = optimizer
        self._lr_schedule = lr_schedule
        self._steps = steps
        self._clip_grad_norm = clip_grad_norm
        self._global_norm = clipping.GlobalNorm(dag)
        storage = StorageGroups(dag)

        self._names = {parameter.op: parameter.name for parameter in clipping.home_order(dag, fragment)}
        self._names |= {op: dag.ops[op].target for op in fragment.written_buffers}
        self._stored = (*fragment.parameters, *fragment.written_buffers, *fragment.constants)
        self.state_names: tuple[str, ...] = tuple(dag.ops[op].target for op in self._stored)
        """Keys to fetch from the weights blob for `load`."""
        self._parameters: dict[int, Tensor] = {}
        self._buffers: dict[int, Tensor] = {}
        self._optimizer = FragmentOptimizer(optimizer, {})

        self._renewed = frozenset(
            buffer for buffer in fragment.written_buffers if recompute or storage.needed_backward(buffer)
        )

        self._graph = Passes(dag, fragment, storage, seed=seed, micro_batches=micro_batches, device=self._device)
        waiting = {parameter for _, parameters in fragment.postponed for parameter in parameters}
        self._prompt = tuple(op for op in self._names if op in fragment.parameters and op not in waiting)
        self._passes: dict[tuple[int, int], Pass] = {}
        self._inputs: dict[tuple[int, int], Inputs] = {}
        self._owed: dict[tuple[int, int], PostponedWeights] = {}
        """(step, micro-batch) -> the second half of a backward, oldest first."""
        self._first_backward = True

    # State

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """State-dict keys of the parameters at home here, in the order of `model.parameters()`."""
        return tuple(self._named(self._parameters))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take copies of the tensors that `state_names` names, and start the optimizer anew.

        Raises `BlobError` when one is missing or has another shape or dtype than the OP-DAG says.
        """
        values: dict[int, Tensor] = {}
        for op_id in self._stored:
            op = self._dag.ops[op_id]
            if op.target not in tensors:
                raise BlobError(f"the weights hold no tensor {op.target!r}, which the OP-DAG names")
            found = meta_of(tensors[op.target])
            if found != op.meta:
                raise BlobError(f"tensor {op.target!r} of the weights is {found}, the OP-DAG says {op.meta}")
            values[op_id] = tensors[op.target].detach().to(self._device, copy=True)
        self._parameters = {
            parameter.op: values[parameter.op].requires_grad_()
            for parameter in clipping.home_order(self._dag, self.fragment)
        }
        self._buffers = {op_id: values[op_id] for op_id in self.fragment.written_buffers}
        self._graph.bind(values)
        self._optimizer = FragmentOptimizer(self._optimizer_spec, self._named(self._parameters))
        self._passes.clear()
        self._inputs.clear()
        self._owed.clear()
        self._first_backward = True

    def state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of all that training changes (`executor.snapshot` has the keys).

        Take it between an update and the next forward.
        """
        return snapshot.take(self._named(self._parameters), self._named(self._buffers), self._optimizer)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, after `load`. Keys of other fragments, and keys left out, are passed over.

        Raises `BlobError` when a tensor has another shape or dtype than the one it replaces.
        """
        snapshot.restore(tensors, self._named(self._parameters), self._named(self._buffers), self._optimizer)

    def parameter_values(self) -> dict[int, Tensor]:
        """Outgoing parameter edge -> a copy of its value now; due at the start and after each update."""
        values = ((self._parameters[value].detach().clone(), edges) for value, edges in self._graph.lent)
        return {edge.index: value for value, edges in values for edge in edges}

    # Tasks

    def forward(
        self,
        step: int,
        micro_batch: int,
        arrivals: Mapping[int, Tensor],
        data: Mapping[str, Tensor],
        *,
        postpone: bool = False,
    ) -> ForwardResult:
        """Run one micro-batch forward and keep what its backward needs.

        `arrivals` holds every incoming edge by index, the step's borrowed parameters among them; `data` the placeholders
        by key. Both are only read, and must stay unchanged until the backward. With `postpone`, the same for all
        micro-batches of a step, the backward leaves the gradients of `fragment.postponed` for `weights`.
        """
        before = self._buffers
        if self._renewed:
            self._buffers = {op: value.clone() if op in self._renewed else value for op, value in before.items()}
        inputs = Inputs(arrivals, data, self._buffers, postpone)
        values, kept = self._graph.differentiable(step, micro_batch, inputs, self._parameters)
        result = self._graph.result(values)
        if self._recompute:
            edges = {edge.index: arrivals[edge.index] for edge in self.fragment.inputs}
            self._inputs[step, micro_batch] = Inputs(edges, dict(data), before, postpone)
        else:
            self._passes[step, micro_batch] = kept
        return result

    def backward(self, step: int, micro_batch: int, gradients: Mapping[int, Tensor | None]) -> dict[int, Tensor | None]:
        """Run one micro-batch backward: parameters' gradients add up here, the others are returned.

        `gradients` holds every outgoing edge with a gradient by index, None for a null gradient; the same goes for the
        result and the incoming edges with a gradient. After a forward with `postpone`, the parameters in
        `fragment.postponed` get theirs from `weights`.
        """
        if self._recompute:
            inputs = self._inputs.pop((step, micro_batch))
            scratch = {op: value.clone() for op, value in inputs.buffers.items()}
            kept = self._graph.differentiable(step, micro_batch, replace(inputs, buffers=scratch), self._parameters)[1]
        else:
            kept = self._passes.pop((step, micro_batch))
        roots, root_gradients = self._graph.begin_of_backward(kept, gradients)
        leaves, postponed = kept.leaves, kept.postponed
        del kept
        if roots and postponed is None:
            torch.autograd.backward(roots, root_gradients)
        elif roots and postponed is not None:
            prompt = [leaf for _, leaf in leaves] + [self._parameters[op] for op in self._prompt]
            torch.autograd.backward(roots, root_gradients, retain_graph=True, inputs=prompt)
            self._owed[step, micro_batch] = postponed
        returned = {edge: leaf.grad for edge, leaf in leaves}
        if self._first_backward:
            # In the micro-batches to come, autograd adds to these gradients in place.
            sent = [gradient for gradient in returned.values() if gradient is not None]
            own_gradients(tuple(self._parameters.values()), (*root_gradients, *sent))
            self._first_backward = False
        return {edge: None if gradient is None else alone(gradient) for edge, gradient in returned.items()}

    def weights(self, step: int, micro_batch: int) -> bool:
        """Compute what the micro-batch's backward left, of one op; whether there is more, so that something urgent can go
        between. Micro-batches in order, so that the sums come out the same.
        """
        postponed = self._owed.get((step, micro_batch))
        if postponed is not None and postponed.compute():
            return True
        self._owed.pop((step, micro_batch), None)
        return False

    @property
    def apart(self) -> bool:
        """Whether micro-batches of a step don't depend on each other, and there is something to gain: `whole` may be used."""
        return self._device.type == "cpu" and not self.fragment.written_buffers and not self._recompute

    def whole(
        self,
        step: int,
        micro_batch: int,
        arrivals: Mapping[int, Tensor],
        data: Mapping[str, Tensor],
        gradients: Mapping[int, Tensor | None],
    ) -> Whole:
        """`forward` and `backward` of one micro-batch, with nothing of this object changed: several threads may do this at
        the same time, between two updates. `add_up` is to follow in place of the backward.
        """
        begin = thread_time()
        # Leaves that share the parameters' memory: what autograd adds up in them is this micro-batch's alone.
        parameters = {op: value.detach().requires_grad_() for op, value in self._parameters.items()}
        values, kept = self._graph.differentiable(step, micro_batch, Inputs(arrivals, data, self._buffers), parameters)
        result = self._graph.result(values)
        del values
        middle = thread_time()
        roots, root_gradients = self._graph.begin_of_backward(kept, gradients)
        leaves = kept.leaves
        del kept
        if roots:
            torch.autograd.backward(roots, root_gradients)
        returned = {edge: leaf.grad for edge, leaf in leaves}
        sent = [gradient for gradient in returned.values() if gradient is not None]
        own_gradients(tuple(parameters.values()), (*root_gradients, *sent))
        return Whole(
            result,
            {edge: None if gradient is None else alone(gradient) for edge, gradient in returned.items()},
            {op: leaf.grad for op, leaf in parameters.items()},
            middle - begin,
            thread_time() - middle,
        )

    def add_up(self, whole: Whole) -> None:
        """Add a micro-batch's gradients to those of the micro-batches before it, as autograd would have; micro-batches in
        order, each once. What those before it left for `weights` is computed first.
        """
        self._settle()
        for op, gradient in whole.gradients.items():
            parameter = self._parameters[op]
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        # What a backward of this step may still add to is owned.
        self._first_backward = False

    def norms(self) -> Tensor:
        """Float32 (parameters at home,) on the CPU: the norm of each gradient, in the order of `model.parameters()`.

        `clipping.NO_GRADIENT` (-1) stands for a parameter without gradient.
        """
        self._settle()
        return clipping.norms_of(tuple(self._parameters.values()))

    def update(self, step: int, norms: Mapping[int, Tensor] | None) -> float | None:
        """Clip, step the optimizer and drop the gradients. Returns the global gradient norm when clipping.

        `norms` maps every fragment's index to its `norms()` of this step; without clipping it is not read.
        Raises `FrameError` when the norms do not fit the model.
        """
        self._settle()
        total: float | None = None
        if self._clip_grad_norm is not None:
            norm = self._global_norm.total(norms or {}, self._device)
            clipping.clip(tuple(self._parameters.values()), self._clip_grad_norm, norm)
            total = float(norm)
        self._optimizer.step(factor(self._lr_schedule, step, self._steps))
        self._first_backward = True
        return total

    def evaluate(
        self, step: int, batch: int, arrivals: Mapping[int, Tensor], data: Mapping[str, Tensor]
    ) -> ForwardResult:
        """Run one evaluation batch: like `forward`, but in evaluation form and without gradients; changes no state."""
        return self._graph.evaluate(step, batch, Inputs(arrivals, data, self._buffers))

    # Pieces

    def _settle(self) -> None:
        """What no `weights` has asked for yet belongs to the step all the same."""
        for step, micro_batch in list(self._owed):
            while self.weights(step, micro_batch):
                pass

    def _named(self, tensors: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return {self._names[op]: tensor for op, tensor in tensors.items()}


def _indexed(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0` (or the current one), so that it compares equal to the device of a tensor on it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
