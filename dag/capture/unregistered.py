"""Layers and tensors that a model keeps where torch does not look, in a plain list, say: nothing trains them, here or elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

_INTERNAL = frozenset(nn.Module().__dict__)
_DEPTH = 3
_LENGTH = 10_000


def notes_on_unregistered(model: nn.Module, constants: Iterable[torch.Tensor]) -> list[str]:
    """A note for each attribute of a module with tensors that the loss depends on, and that require a gradient for nobody.

    `constants` are the tensors that capture found to be neither parameters nor buffers.
    """
    taken = {tensor.data_ptr() for tensor in constants} - {0}  # On the meta device all are at 0.
    registered = {id(parameter) for parameter in model.parameters()}
    notes = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _INTERNAL:
                continue
            found = [
                tensor for tensor in _tensors(value, _DEPTH) if tensor.requires_grad and id(tensor) not in registered
            ]
            if any(tensor.is_leaf and tensor.data_ptr() in taken for tensor in found):
                notes.append(
                    f"{path + '.' if path else ''}{name} of {type(module).__name__} holds what torch does not take for parameters "
                    f"of the model, as a {type(value).__name__} is no module: it is not trained; use nn.ModuleList, "
                    "nn.ModuleDict or nn.ParameterList, or requires_grad_(False) where that is meant"
                )
    return notes


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, Mapping | list | tuple | set) and depth and len(value) <= _LENGTH:
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each, depth - 1)
