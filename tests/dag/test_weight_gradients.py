"""Which parameters' gradients can wait, in captured models and at the borders of fragments."""

from __future__ import annotations

import pytest
import torch
from dag_cases import captured
from torch import Tensor, nn

from dag.capture import capture
from dag.cut import cut, cut_points, differentiated
from dag.graph import OpDag
from dag.weight_gradients import separable


def names(dag: OpDag, parameters: set[int]) -> set[str]:
    return {dag.ops[parameter].target for parameter in parameters}


def waiting(dag: OpDag) -> set[str]:
    return names(dag, {each for found in separable(dag, differentiated(dag)).values() for each in found})


class Sharing(nn.Module):
    """A layer that is used twice, one that is frozen, one whose weight is used in another way, and an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.frozen, self.odd, self.plain = (nn.Linear(4, 4) for _ in range(4))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(self.twice(x))
        h = self.frozen(h)
        h = self.odd(h) + self.odd.weight.sum()
        return self.plain(h)


def test_only_parameters_that_one_op_uses_can_wait() -> None:
    x = torch.randn(2, 4)
    dag = capture(Sharing(), {"inputs": x, "targets": x}, "mse").dag
    assert waiting(dag) == {"odd.bias", "plain.weight", "plain.bias"}


def test_tied_weights_and_what_is_no_product_can_t_wait() -> None:
    dag = captured("gpt tied")[1].dag
    found = waiting(dag)
    assert found
    assert not any("norm" in name or "embedding" in name for name in found)
    tied = {op.target for op in dag.ops if op.kind == "parameter" and len(dag.users[op.id]) > 1}
    assert tied
    assert tied.isdisjoint(found)


def test_convolutions_can_wait_and_their_normalizations_can_t() -> None:
    dag = captured("resnet18")[1].dag
    users = {op.target: dag.ops[dag.users[op.id][0]].target for op in dag.ops if op.kind == "parameter"}
    found = waiting(dag)
    assert found == {name for name, user in users.items() if user in ("aten.conv2d.default", "aten.linear.default")}
    assert "aten.batch_norm.default" in users.values()


@pytest.mark.parametrize("family", ["gpt tied", "resnet18"])
def test_nothing_waits_in_a_fragment_that_sends_no_gradient(family: str) -> None:
    dag = captured(family)[1].dag
    positions = [point.position for point in cut_points(dag)]
    for position in (positions[len(positions) // 3], positions[len(positions) // 2]):
        first, second = cut(dag, (position,)).fragments
        assert first.postponed == ()
        assert second.postponed
        assert {each for _, found in second.postponed for each in found} <= set(second.parameters)


def test_a_cast_that_stayed_in_the_fragment_before_does_not_count() -> None:
    x = torch.randn(2, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    dag = capture(model, {"inputs": x, "targets": x}, "mse", autocast="bfloat16").dag
    found = waiting(dag)
    assert found == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for point in cut_points(dag):
        for fragment in cut(dag, (point.position,)).fragments:
            for op, parameters in fragment.postponed:
                assert op in fragment.ops
                assert set(parameters) <= set(fragment.parameters)
