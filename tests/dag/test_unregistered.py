"""Layers in a plain list are not trained by anybody: that is said, as it is seldom meant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dag.capture import capture

EXAMPLE = {"inputs": torch.randn(4, 8), "targets": torch.zeros(4).long()}


class Layers(nn.Module):
    """Has layers in whatever `kept` makes of them."""

    def __init__(self, kept: Callable[[list[nn.Module]], object]) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(8, 8), nn.Linear(8, 8)]
        self.layers = kept(layers)
        self.call = lambda: layers
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.call():
            x = layer(x)
        return self.head(x)


class Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scales = [scale]
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scales[0])


@pytest.mark.parametrize(
    ("kept", "kind"),
    [(list, "list"), (tuple, "tuple"), (lambda layers: {"a": layers}, "dict"), (lambda layers: [layers], "list")],
)
def test_layers_that_are_not_trained_are_told(kept: Callable[[list[nn.Module]], object], kind: str) -> None:
    (note,) = capture(nn.Sequential(Layers(kept)), EXAMPLE, "cross_entropy").dag.notes
    assert note.startswith("0.layers of Layers holds what torch does not take for parameters")
    assert f"as a {kind} is no module" in note


def test_tensors_that_are_not_trained_are_told() -> None:
    (note,) = capture(Scaled(nn.Parameter(torch.ones(8))), EXAMPLE, "cross_entropy").dag.notes
    assert note.startswith("scales of Scaled")


def test_what_is_trained_or_meant_so_is_not_spoken_of() -> None:
    assert capture(Layers(nn.ModuleList), EXAMPLE, "cross_entropy").dag.notes == ()
    assert capture(Scaled(torch.ones(8)), EXAMPLE, "cross_entropy").dag.notes == ()
    fixed = Layers(list)
    for layer in fixed.call():
        layer.requires_grad_(False)
    assert capture(fixed, EXAMPLE, "cross_entropy").dag.notes == ()


def test_a_list_of_registered_layers_is_not_spoken_of() -> None:
    model = Layers(nn.ModuleList)
    model.again = [*model.layers]  # type: ignore[assignment,misc]
    assert capture(model, EXAMPLE, "cross_entropy").dag.notes == ()
