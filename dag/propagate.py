"""Runs ops on tensors without data: shapes, dtypes, who requires gradients, FLOPs, saved bytes and shared storage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dag.graph import Op, OpDag, Ref, TensorMeta
from dag.operators import meta_of, run, torch_dtype
from dag.quiet import quiet
from fusion.errors import DagError

CPU = torch.device("cpu")


def _flash_attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _flash_attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]


def _lstm_flops(inputs: Any, weight: Any, recurrent: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """One layer and direction: each position's input and state times the weights of the four gates."""
    positions = inputs[0] * inputs[1]
    return int(2 * positions * (weight[0] * weight[1] + recurrent[0] * recurrent[1]))


def _lstm_backward_flops(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _lstm_flops(*args)


# torch counts nothing for LSTM layers and for attention without a mask on the CPU: its registry lacks these operators.
FLOP_FORMULAS: dict[Any, Any] = {
    torch.ops.aten.mkldnn_rnn_layer: _lstm_flops,
    torch.ops.aten.mkldnn_rnn_layer_backward: _lstm_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flash_attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_attention_backward_flops,
}


@dataclass(frozen=True)
class Observation:
    """What one op did when it ran on tensors without data."""

    outputs: tuple[TensorMeta, ...]
    requires_grad: bool
    differentiable: bool
    """Not so when a gradient is wanted, and torch has no formula for it."""
    storages: frozenset[int]
    """Identities of the storages of its outputs, comparable within one run."""
    dense: bool
    """Its single output covers its memory without gaps or overlaps."""
    flops: int
    backward_flops: int
    saved_bytes: int


class OpError(Exception):
    """An op that torch can't run on the shapes it gets; `op` is its id."""

    def __init__(self, op: Op, error: Exception) -> None:
        super().__init__(f"{op.name} ({op.target}): {' '.join(str(error).split())[:300]}")
        self.op = op.id


def observe(ops: Sequence[Op], leaves: Mapping[int, TensorMeta], *, costs: bool = True) -> list[Observation]:
    """Run `ops` in order on tensors without data; `leaves` has the metas of inputs, parameters, buffers and constants.

    Raises `OpError` for an op that fails.
    """
    values: dict[int, Any] = {}
    observations: list[Observation] = []
    with quiet(), FakeTensorMode(), torch.enable_grad():
        saved = _SavedBytes()
        for op in ops:
            if op.kind in ("call", "loss"):
                flops = backward_flops = 0
                try:
                    if costs:
                        flops, backward_flops = _flops(op, values)
                    with saved.counting():
                        value = run(op, values, CPU)
                except Exception as error:
                    raise OpError(op, error) from error
            else:
                flops = backward_flops = 0
                value = fake(leaves[op.id], requires_grad=op.kind == "parameter")
                saved.ignore(value)
            values[op.id] = value
            tensors = list(value) if isinstance(value, list | tuple) else [value]
            observations.append(
                Observation(
                    outputs=tuple(meta_of(tensor) for tensor in tensors),
                    requires_grad=any(tensor.requires_grad for tensor in tensors),
                    differentiable=not any(
                        tensor.grad_fn is not None and tensor.grad_fn.name().endswith("NotImplemented")
                        for tensor in tensors
                    ),
                    storages=frozenset(_storage(tensor) for tensor in tensors),
                    dense=len(tensors) == 1 and _is_dense(tensors[0]),
                    flops=flops,
                    backward_flops=backward_flops,
                    saved_bytes=saved.take(),
                )
            )
    return observations


def fake(meta: TensorMeta, *, requires_grad: bool) -> torch.Tensor:
    """A tensor without data; call it under a `FakeTensorMode`."""
    return torch.empty(meta.shape, dtype=torch_dtype(meta.dtype), requires_grad=requires_grad)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _is_dense(tensor: torch.Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


class _SavedBytes:
    """Counts what autograd keeps; each storage once, parameters and inputs that a fragment holds anyway never."""

    def __init__(self) -> None:
        self._seen: dict[int, torch.UntypedStorage] = {}  # keeps them alive, so that identities stay unique
        self._bytes = 0

    def ignore(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._seen[int(storage._cdata)] = storage

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if int(storage._cdata) not in self._seen:
            self._seen[int(storage._cdata)] = storage
            self._bytes += min(storage.nbytes(), tensor.numel() * tensor.element_size())
        return tensor

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def take(self) -> int:
        """Bytes since the last call."""
        count, self._bytes = self._bytes, 0
        return count


def _flops(op: Op, values: Mapping[int, Any]) -> tuple[int, int]:
    """Forward and backward FLOPs of one op, run alone on copies of its inputs."""
    if op.kind == "loss" or op.target == "py.getitem":
        return 0, 0
    alone: dict[int, Any] = {}
    wanting: list[torch.Tensor] = []
    for source in op.inputs():
        tensor = values[source]
        copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        if tensor.requires_grad:
            wanting.append(copy.requires_grad_())
            # An operator that writes in place would refuse a leaf.
            copy = copy.view_as(copy) if not op.target.split(".")[1].endswith("_") else copy.clone()
        alone[source] = copy
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        result = run(op, alone, CPU)
    flops = int(counter.get_total_flops())
    outputs = [item for item in (result if isinstance(result, list | tuple) else (result,)) if item.requires_grad]
    if not flops or not wanting or not outputs:
        return flops, 0
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        torch.autograd.grad(outputs, wanting, [torch.empty_like(item) for item in outputs], allow_unused=True)
    return flops, int(counter.get_total_flops())


def check_shapes(dag: OpDag, op_ids: Iterable[int]) -> None:
    """Raise `DagError` unless the ops give the shapes and dtypes that `dag` declares.

    A worker calls this before it runs a fragment, so that a DAG that lies can't take memory that nobody planned. Inputs
    from outside `op_ids` are taken as declared. Nothing is computed and no data memory is taken.
    """
    inside = sorted(set(op_ids))
    members = set(inside)
    values: dict[int, Any] = {}

    def checked(op: Op) -> Any:
        for source in op.inputs():
            if source not in values:
                if source in members and dag.ops[source].kind in ("call", "loss"):
                    raise DagError(f"op {op.name} runs before op {dag.ops[source].name}, which it reads")
                outputs = [fake(meta, requires_grad=False) for meta in dag.ops[source].outputs]
                values[source] = outputs[0] if len(outputs) == 1 and op.target != "py.getitem" else outputs
        _check_pieces(dag, op)
        try:
            value = run(op, values, CPU)
        except DagError:
            raise
        except Exception as error:
            raise DagError(f"op {op.name} ({op.target}) can't run: {' '.join(str(error).split())[:300]}") from None
        found = _metas(value)
        if found != op.outputs:
            raise DagError(f"op {op.name} ({op.target}) declares {_spell(op.outputs)} but gives {_spell(found)}")
        return value

    with quiet(), FakeTensorMode(), torch.no_grad():
        for op_id in inside:
            op = dag.ops[op_id]
            if op.kind not in ("call", "loss"):
                continue
            form = dag.rewired_ops.get(op_id)
            if form is not None:
                checked(replace(op, args=form.args, kwargs=form.kwargs))
            values[op_id] = checked(op)


def _metas(value: Any) -> tuple[TensorMeta, ...] | None:
    items = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(item, torch.Tensor) for item in items):
        return None
    return tuple(meta_of(item) for item in items)


def _spell(metas: tuple[TensorMeta, ...] | None) -> str:
    if metas is None:
        return "something that is not a tensor"
    return ", ".join(f"{meta.dtype}{list(meta.shape)}" for meta in metas[:4]) + (", ..." if len(metas) > 4 else "")


_SPLITTERS = {
    "aten.unbind.int": (None, 1),
    "aten.split.Tensor": (1, 2),
    "aten.chunk.default": (1, 2),
    "aten.tensor_split.sections": (1, 2),
    "aten.hsplit.int": (1, None),
    "aten.vsplit.int": (1, None),
    "aten.dsplit.int": (1, None),
}
"""Operators that give as many tensors as a number says: positions of that number and of the axis."""


def _check_pieces(dag: OpDag, op: Op) -> None:
    """Refuse a list of tensors that is longer than declared before torch builds it, one object per tensor."""
    if op.target not in _SPLITTERS or not isinstance(op.args[0], Ref):
        return
    number_at, axis_at = _SPLITTERS[op.target]
    shape = dag.ops[op.args[0].op].meta.shape
    number = op.args[number_at] if number_at is not None and number_at < len(op.args) else 0
    axis = op.args[axis_at] if axis_at is not None and axis_at < len(op.args) else dict(op.kwargs).get("dim", 0)
    if not isinstance(number, int) or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        return  # torch refuses it
    if op.target == "aten.unbind.int":
        pieces = shape[axis]
    elif op.target == "aten.split.Tensor":
        pieces = -(-shape[axis] // number) if number > 0 else 0
    elif op.target == "aten.chunk.default":
        pieces = min(number, shape[axis])
    else:
        pieces = number
    if pieces > max(1, len(op.outputs)):
        raise DagError(f"op {op.name} ({op.target}) gives {pieces} tensors, but declares {len(op.outputs)}")


def with_observations(ops: Sequence[Op], observations: Sequence[Observation]) -> list[Op]:
    """`ops` with their shapes, dtypes, requirements and costs filled in."""
    return [
        replace(
            op,
            outputs=seen.outputs,
            requires_grad=seen.requires_grad,
            flops=seen.flops,
            backward_flops=seen.backward_flops,
            saved_bytes=seen.saved_bytes,
        )
        for op, seen in zip(ops, observations, strict=True)
    ]
