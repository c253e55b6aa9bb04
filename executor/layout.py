"""Memory layout of values that cross a border: they travel contiguous, and are put back as the uncut model has them.

An LSTM's output or an attention head's is a transposed view. Operators add up in memory order, so the bits of a mean or a
matrix product over such a value depend on its layout; so do those of what is computed from its gradient, whose layout may be
another. The receiver finds both by running the ops on tensors without data, forward and back; both ends of an edge on one
worker go through the same steps, so placement changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dag.graph import OpDag
from dag.operators import run, torch_dtype
from dag.propagate import check_shapes

log = logging.getLogger(__name__)

_ALIGNMENT = 64
"""Bytes: kernels may round by how an address lies to this, and torch's memory begins at multiples of it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor lies in its memory."""

    strides: tuple[int, ...]
    offset: int
    """Elements before it, beyond a multiple of the alignment."""


@dataclass(frozen=True, slots=True)
class Layouts:
    """Of the body's values and of their gradients, by op; what is left out is row-major and begins its memory."""

    values: Mapping[int, Layout]
    gradients: Mapping[int, Layout]
    """A gradient whose value lies in another way than it does is here, too."""


@lru_cache(maxsize=2)
def layouts(dag: OpDag) -> Layouts:
    """How the uncut model's values and gradients lie. Raises `DagError` when the ops can't run."""
    check_shapes(dag, (op.id for op in dag.ops))
    values: dict[int, Layout] = {}
    gradients: dict[int, Layout] = {}
    made: dict[int, Any] = {}
    last_use = {source: op.id for op in dag.training for source in op.inputs()}

    def watch(op: int, value: Tensor) -> None:
        usual = torch.empty_like(value).is_contiguous()

        def found(gradient: Tensor) -> None:
            # What is expanded is left to lie as the value does, which it is combined with.
            if _separate(gradient) and not (usual and _plain(gradient)):
                gradients[op] = _layout(gradient)

        value.register_hook(found)  # type: ignore[no-untyped-call]

    with FakeTensorMode(), torch.enable_grad():
        for op in dag.training:
            if op.kind in ("call", "loss"):
                value = run(op, made, torch.device("cpu"))
            else:
                dtype = torch_dtype(op.meta.dtype)
                value = torch.empty(op.meta.shape, dtype=dtype, requires_grad=op.kind == "parameter")
            made[op.id] = value
            if op.kind == "call" and isinstance(value, Tensor):
                lying = value if _separate(value) else torch.empty_like(value)
                if not _plain(lying):
                    values[op.id] = _layout(lying)
                if value.requires_grad:
                    watch(op.id, value)
            for source in op.inputs():
                if last_use[source] == op.id:
                    del made[source]
        _backward(made[dag.loss.id])
    return Layouts(values, gradients)


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # Kernels that know no tensors without data raise what they like.
        log.warning(
            "how gradients lie is not known before an operator that fails without data (%s: %s); there they are laid out as "
            "their values, and the last bits may depend on the cuts",
            type(error).__name__,
            " ".join(str(error).split()),
        )


def _layout(tensor: Tensor) -> Layout:
    return Layout(tensor.stride(), int(tensor.storage_offset()) % (_ALIGNMENT // tensor.element_size()))


def _plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not _layout(tensor).offset


def _separate(tensor: Tensor) -> bool:
    """Whether no two of its elements share a place: it is not expanded, nor made of windows that overlap."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return False
            reach += stride * (size - 1)
    return True


def alone(tensor: Tensor) -> Tensor:
    """`tensor` detached and contiguous, with memory that holds nothing else; itself when it is so already.

    A piece of a larger tensor would keep all of it alive, and would lie at an address that a received copy has not.
    """
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def arranged(tensor: Tensor, layout: Layout | None) -> Tensor:
    """`tensor`, which is contiguous, copied to memory where it lies like that; itself when there is nothing to keep."""
    if layout is None or not tensor.numel() or (tensor.stride() == layout.strides and not layout.offset):
        return tensor
    reach = sum(stride * (size - 1) for stride, size in zip(layout.strides, tensor.shape, strict=True))
    memory = torch.empty(layout.offset + reach + 1, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, layout.strides, layout.offset).copy_(tensor)


def arranged_like(tensor: Tensor, model: Tensor) -> Tensor:
    """`tensor` in the layout of `model`, without gaps."""
    if model.is_contiguous():
        return tensor
    empty = torch.empty_like(model, requires_grad=False)
    return tensor if empty.is_contiguous() else empty.copy_(tensor)
