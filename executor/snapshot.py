"""A fragment's whole state at a step boundary, as tensors by key.

Keys: `parameter/NAME`, `buffer/NAME` (the buffers that the fragment writes), `optimizer/SLOT/NAME`. Step counters are
tensors too, so restoring is exact. Names are state-dict keys, so a snapshot does not depend on the cut.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dag.operators import meta_of
from executor.optimizers import FragmentOptimizer
from fusion.errors import BlobError


def take(
    parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], optimizer: FragmentOptimizer
) -> dict[str, Tensor]:
    """Contiguous copies on the CPU."""
    tensors = {f"parameter/{name}": value for name, value in parameters.items()}
    tensors |= {f"buffer/{name}": value for name, value in buffers.items()}
    tensors |= {f"optimizer/{slot}/{name}": value for slot, name, value in optimizer.state()}
    return {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }


def restore(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimizer: FragmentOptimizer,
) -> None:
    """Write a snapshot's values into the given tensors and the optimizer.

    Keys that name none of them are passed over, so a consolidated snapshot of all fragments will do.
    Raises `BlobError` when a tensor has another shape or dtype than the one it replaces.
    """
    slots: dict[tuple[str, str], Tensor] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "optimizer":
            slot, _, name = name.partition("/")
            if name in parameters:
                slots[slot, name] = value
            continue
        target = {"parameter": parameters, "buffer": buffers}.get(kind, {}).get(name)
        if target is None:
            continue
        if meta_of(target) != meta_of(value):
            raise BlobError(f"{key} of the snapshot is {meta_of(value)}, the fragment has {meta_of(target)}")
        with torch.no_grad():
            target.copy_(value)
    optimizer.load(slots)
