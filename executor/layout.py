"""Memory layout of values that cross a border: they travel contiguous, and are put back as the uncut model has them.

An LSTM's output or an attention head's is a transposed view. Operators add up in memory order, so the bits of a mean or a
matrix product over such a value depend on its layout. The receiver finds the layout by running the ops before it on
tensors without data; both ends of an edge on one worker go through the same steps, so placement changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dag.graph import OpDag
from dag.operators import run, torch_dtype
from dag.propagate import check_shapes


@lru_cache(maxsize=2)
def transposed(dag: OpDag) -> Mapping[int, tuple[int, ...]]:
    """Op id -> strides, for the body's values whose dimensions do not lie in memory in their order.

    The strides are those of a copy without gaps (`torch.empty_like`). Raises `DagError` when the ops can't run.
    """
    check_shapes(dag, (op.id for op in dag.ops))
    found: dict[int, tuple[int, ...]] = {}
    values: dict[int, Any] = {}
    last_use = {source: op.id for op in dag.ops for source in op.inputs()}
    with FakeTensorMode(), torch.enable_grad():
        for op in dag.ops:
            if op.kind in ("call", "loss"):
                value = run(op, values, torch.device("cpu"))
            else:
                dtype = torch_dtype(op.meta.dtype)
                value = torch.empty(op.meta.shape, dtype=dtype, requires_grad=op.kind == "parameter")
            values[op.id] = value
            if isinstance(value, Tensor) and not value.is_contiguous():
                copy = torch.empty_like(value)
                if not copy.is_contiguous():
                    found[op.id] = copy.stride()
            for source in op.inputs():
                if last_use[source] == op.id:
                    del values[source]
    return found


def alone(tensor: Tensor) -> Tensor:
    """`tensor` detached and contiguous, with memory that holds nothing else; itself when it is so already.

    A piece of a larger tensor would keep all of it alive, and would lie at an address that a received copy has not.
    """
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def arranged(tensor: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """`tensor`, copied to memory with these strides; itself when there are none to keep."""
    if strides is None:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def arranged_like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` in the layout of `model`, without gaps."""
    if model.is_contiguous():
        return tensor
    empty = torch.empty_like(model, requires_grad=False)
    return tensor if empty.is_contiguous() else empty.copy_(tensor)
