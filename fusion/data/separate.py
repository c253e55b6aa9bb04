"""Tensors as safetensors takes them: plain ones, of which none shares memory with another."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies where memory is shared: tied weights, or one tensor as inputs and targets."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if memory in seen or value.untyped_storage().nbytes() != value.nbytes else value
        seen.add(memory)
    return plain
