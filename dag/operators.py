"""The torch side of the OP-DAG: from an op's target and arguments to the callable and the values it runs with.

Only targets on the allow-list resolve, and only through `torch.ops.aten`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch

from dag.allowlist import ALLOWED, GETITEM
from dag.graph import DTYPE_BYTES, Arg, Named, Op, Ref, TensorMeta
from fusion.errors import DagError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
LAYOUTS: dict[str, torch.layout] = {"strided": torch.strided}
MEMORY_FORMATS: dict[str, torch.memory_format] = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}


@cache
def resolve(target: str) -> Callable[..., Any]:
    """The callable of an allow-listed target (`aten.linear.default`, `py.getitem`). Raises `DagError` for any other."""
    if target not in ALLOWED:
        raise DagError(f"operator {target} is not on the allow-list")
    if target == GETITEM:
        return operator.getitem
    _, packet, overload = target.split(".")
    try:
        return getattr(getattr(torch.ops.aten, packet), overload)  # type: ignore[no-any-return]
    except AttributeError:
        raise DagError(f"operator {target} does not exist in torch {torch.__version__}") from None


def torch_dtype(name: str) -> torch.dtype:
    """`float32` -> `torch.float32`. Raises `DagError` for a dtype that Fusion does not carry."""
    try:
        return DTYPES[name]
    except KeyError:
        raise DagError(f"dtype {name!r} is not supported; use one of {', '.join(DTYPES)}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")


def meta_of(tensor: torch.Tensor) -> TensorMeta:
    """Shape and dtype of a tensor."""
    return TensorMeta(tuple(int(size) for size in tensor.shape), dtype_name(tensor.dtype))


def named(value: object) -> Named | None:
    """A torch dtype, device, layout or memory format as the DAG spells it; None for any other value.

    Every device becomes the one that the fragment runs on. What Fusion does not carry keeps torch's name, and validation
    refuses it.
    """
    if isinstance(value, torch.dtype):
        return Named("dtype", dtype_name(value))
    if isinstance(value, torch.device):
        return Named("device", "")
    if isinstance(value, torch.layout):
        return Named("layout", str(value).removeprefix("torch."))
    if isinstance(value, torch.memory_format):
        return Named("memory_format", str(value).removeprefix("torch."))
    return None


def materialize(arg: Arg, values: Mapping[int, Any], device: torch.device) -> Any:
    """The Python value of one argument: references looked up in `values`, names turned into torch objects."""
    if isinstance(arg, Ref):
        return values[arg.op]
    if isinstance(arg, tuple):
        return [materialize(item, values, device) for item in arg]
    if isinstance(arg, Named):
        return _named(arg, device)
    return arg


def _named(arg: Named, device: torch.device) -> Any:
    table: Mapping[str, Any]
    if arg.kind == "device":
        return device
    if arg.kind == "dtype":
        return torch_dtype(arg.name)
    table = LAYOUTS if arg.kind == "layout" else MEMORY_FORMATS
    if arg.name not in table:
        raise DagError(f"{arg.kind} {arg.name!r} is not supported; use one of {', '.join(table)}")
    return table[arg.name]


def run(op: Op, values: Mapping[int, Any], device: torch.device) -> Any:
    """Run one call op (or pass the loss through) on `values`, which maps op ids to tensors or lists of tensors.

    Honours `op.no_grad`; seeding of random ops is the caller's.
    """
    if op.kind == "loss":
        return materialize(op.args[0], values, device)
    function = resolve(op.target)
    args = [materialize(arg, values, device) for arg in op.args]
    kwargs = {name: materialize(arg, values, device) for name, arg in op.kwargs}
    if op.no_grad:
        with torch.no_grad():
            return function(*args, **kwargs)
    return function(*args, **kwargs)
