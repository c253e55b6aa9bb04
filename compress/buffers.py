"""Tensors as bytes and bytes as tensors, without a copy where that is safe."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Payload = bytes | bytearray | memoryview


def flatten(tensor: Tensor) -> Tensor:
    """The values row-major, one after the other, in CPU memory; shares memory with a tensor that is so already."""
    dense = tensor.detach().to("cpu").contiguous()
    # A dimension of size one may carry any stride and still count as contiguous; `view(dtype)` would stumble over it.
    return dense.as_strided((dense.numel(),), (1,))


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's memory, row-major. Shares memory with a contiguous CPU tensor; don't write to it until it is sent."""
    return _octets(tensor.detach().to("cpu").contiguous()) if tensor.numel() else memoryview(b"")


def _octets(dense: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor that is not empty."""
    # numpy knows no bfloat16.
    return (dense.view(torch.int16) if dense.dtype == torch.bfloat16 else dense).numpy().data.cast("B")


class _Borrowed:
    """Lends numpy a read-only buffer as if it were writable, so that torch takes it without a warning; keeps it alive."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array
        self.__array_interface__ = dict(array.__array_interface__, data=(array.__array_interface__["data"][0], False))


def borrow(payload: Payload, dtype: str, count: int, offset: int = 0) -> Tensor:
    """`count` values of `dtype` at byte `offset` of the payload: a tensor to read from, never to write to.

    Copies only when the bytes are not aligned. The caller has checked that the payload is long enough.
    """
    if count == 0:
        return torch.empty(0, dtype=getattr(torch, dtype))
    if dtype == "bfloat16":
        return borrow(payload, "int16", count, offset).view(torch.bfloat16)
    array = np.frombuffer(payload, dtype=np.dtype(dtype), count=count, offset=offset)
    if not array.flags.aligned:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(np.asarray(_Borrowed(array)))


def tensor_of(payload: Payload, shape: tuple[int, ...], dtype: str) -> Tensor:
    """A fresh tensor with the payload's bytes, whose number the caller has checked.

    Always a copy: a received frame may start at any address, and matrix kernels may give other bits for memory that is
    not aligned as torch's own is. The thread copies by itself, where torch's own copy would start a team of threads.
    """
    out = torch.empty(shape, dtype=getattr(torch, dtype))
    if out.numel():
        _octets(out)[:] = payload
    return out
