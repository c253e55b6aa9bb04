"""The optimizer of one fragment: torch.optim's own classes over the fragment's parameters, with named, resumable state.

Every one of them works on each parameter alone, so an optimizer per fragment gives the bits of one over the whole model.
Muon is defined for matrices only: with `muon`, a fragment's 2-D parameters go to `torch.optim.Muon` and all others to
`torch.optim.AdamW` with the same learning rate, the same `weight_decay` where it is given, and otherwise torch's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fusion.errors import BlobError
from fusion.spec import OptimizerSpec

_OPTIONS: dict[str, tuple[str, ...]] = {
    "sgd": ("weight_decay", "momentum", "nesterov"),
    "adam": ("weight_decay", "betas", "eps"),
    "adamw": ("weight_decay", "betas", "eps"),
    "adagrad": ("weight_decay", "eps", "lr_decay"),
    "muon": ("weight_decay", "momentum", "nesterov"),
}
_CLASSES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
    "muon": torch.optim.Muon,
}


def build(spec: OptimizerSpec, parameters: Mapping[str, Tensor]) -> list[torch.optim.Optimizer]:
    """The torch optimizers for `parameters`: one, or two for `muon`; none when there are no parameters."""
    groups: dict[str, list[Tensor]] = {}
    for parameter in parameters.values():
        name: str = "adamw" if spec.name == "muon" and parameter.ndim != 2 else spec.name
        groups.setdefault(name, []).append(parameter)
    optimizers = []
    for name, members in groups.items():
        allowed = _OPTIONS[name] if name == spec.name else ("weight_decay",)
        options: dict[str, Any] = {option: value for option in allowed if (value := getattr(spec, option)) is not None}
        optimizers.append(_CLASSES[name](members, lr=spec.lr, **options))
    return optimizers


class FragmentOptimizer:
    """Updates one fragment's parameters and gives its state as tensors by (slot, parameter name)."""

    def __init__(self, spec: OptimizerSpec, parameters: Mapping[str, Tensor]) -> None:
        self._peak = spec.lr
        self._parameters = dict(parameters)
        self._optimizers = build(spec, parameters)
        self._of: dict[str, torch.optim.Optimizer] = {}
        for optimizer in self._optimizers:
            members = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            self._of.update((name, optimizer) for name, tensor in self._parameters.items() if id(tensor) in members)

    def step(self, factor: float) -> None:
        """Update every parameter that has a gradient at `factor` times the peak learning rate; then drop the gradients."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self._peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(slot, parameter name, tensor) of everything the optimizer remembers, step counters included."""
        for name, parameter in self._parameters.items():
            for slot, value in self._of[name].state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield slot, name, value

    def load(self, slots: Mapping[tuple[str, str], Tensor]) -> None:
        """Put back what `state` gave, as copies. Raises `BlobError` when a slot has a shape that its parameter's has not."""
        for (slot, name), value in slots.items():
            parameter = self._parameters[name]
            if value.shape not in (parameter.shape, torch.Size(())):
                raise BlobError(
                    f"optimizer state {slot} of {name} has shape {tuple(value.shape)}, "
                    f"the parameter has {tuple(parameter.shape)}: it belongs to another model"
                )
            # torch keeps step counters on the CPU, whatever the parameter's device, and reads them as numbers.
            device = value.device if slot == "step" else parameter.device
            self._of[name].state[parameter][slot] = value.detach().to(device, copy=True)
