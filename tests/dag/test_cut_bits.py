"""Which models have the same bits wherever they are cut."""

from __future__ import annotations

import pytest
import torch
from dag_cases import captured
from torch import Tensor, nn

from dag.capture import capture
from dag.cut import bits_follow_cuts, cut, cut_points
from dag.graph import OpDag


class Branches(nn.Module):
    """A value with so many uses."""

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(uses))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        total = self.branches[0](h)
        for branch in list(self.branches)[1:]:
            total = total + branch(h)
        return total


def anywhere(dag: OpDag) -> bool:
    """Whether some single cut may decide the bits."""
    return any(bits_follow_cuts(dag, cut(dag, (point.position,))) for point in cut_points(dag))


@pytest.mark.parametrize(("uses", "expected"), [(1, False), (2, False), (3, True)])
def test_three_contributions_that_a_cut_divides(uses: int, expected: bool) -> None:
    x = torch.randn(2, 4)
    dag = capture(Branches(uses), {"inputs": x, "targets": x}, "mse").dag
    assert anywhere(dag) is expected


@pytest.mark.parametrize("family", ["gpt tied", "gpt dropout", "resnet18"])
def test_ordinary_models_can_be_cut_anywhere(family: str) -> None:
    assert not anywhere(captured(family)[1].dag)
