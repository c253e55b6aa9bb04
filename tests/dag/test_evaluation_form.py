"""Evaluation gives what `model.eval()` gives, and changes no state."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dag_cases import CPU, captured
from torch import Tensor, nn

from dag.capture import Captured, capture
from dag.evaluation import evaluation_form
from dag.operators import run


def evaluate(found: Captured, example: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss in evaluation, and the leaves afterwards."""
    values: dict[int, Any] = {}
    leaves: dict[str, Tensor] = {}
    with torch.no_grad():
        for op in found.dag.ops:
            if op.kind == "placeholder":
                values[op.id] = example[op.target]
            elif op.kind not in ("call", "loss"):
                # As in a fragment: torch's matmul rounds by another path for weights that need no gradient.
                value = found.tensors[op.target].clone().requires_grad_(op.kind == "parameter")
                values[op.id] = leaves[op.target] = value
            else:
                form = evaluation_form(op, found.dag)
                if form is not None:
                    assert not form.random
                    values[op.id] = run(form, values, CPU)
    return values[found.dag.loss.id], leaves


@pytest.mark.parametrize("family", ["gpt dropout", "resnet18", "lstm dropout", "unet", "hf bert", "hf gpt2"])
def test_a_family_in_evaluation(family: str) -> None:
    case, found = captured(family)
    model = copy.deepcopy(case.model).eval()
    loss, leaves = evaluate(found, case.example)
    with torch.no_grad():
        assert torch.equal(loss, case.eager(model))
    assert all(torch.equal(value, found.tensors[name]) for name, value in leaves.items())


@pytest.mark.parametrize(
    "layer",
    [
        nn.AlphaDropout(0.5),
        nn.Dropout(0.5, inplace=True),
        nn.FeatureAlphaDropout(0.5),
        nn.Dropout1d(0.5),
        nn.RReLU(),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.InstanceNorm1d(4),
        nn.BatchNorm1d(4, track_running_stats=False),
        nn.GRU(6, 6, 2, dropout=0.5, batch_first=True),
        nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_in_evaluation(layer: nn.Module) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if isinstance(self.layer, nn.MultiheadAttention):
                return self.layer(h, h, h, need_weights=False)[0]  # type: ignore[no-any-return]
            h = self.layer(h)
            return h[0] if isinstance(h, tuple) else h

    torch.manual_seed(0)
    x = torch.randn(2, 4, 6)
    model = Model()
    found = capture(model, {"inputs": x, "targets": x}, "mse")
    loss, leaves = evaluate(found, {"inputs": x, "targets": x})
    with torch.no_grad():
        expected = F.mse_loss(model.eval()(x), x)
    # In evaluation, torch's own attention layer takes a fused path that rounds differently.
    if isinstance(layer, nn.MultiheadAttention):
        torch.testing.assert_close(loss, expected)
    else:
        assert torch.equal(loss, expected)
    assert all(torch.equal(value, found.tensors[name]) for name, value in leaves.items())
