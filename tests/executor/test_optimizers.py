"""Options that are left out take torch's defaults; Muon takes matrices only; state goes out and comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from executor.optimizers import FragmentOptimizer, build
from fusion.spec import OptimizerSpec


def parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(4, 3, generator=generator).requires_grad_(),
        "vector": torch.randn(3, generator=generator).requires_grad_(),
        "idle": torch.randn(2, 2, generator=generator).requires_grad_(),
    }


def train(optimizer: FragmentOptimizer, tensors: dict[str, torch.Tensor], steps: list[int]) -> None:
    for step in steps:
        for name in ("matrix", "vector"):
            tensors[name].grad = torch.full_like(tensors[name], 0.1 * step) + tensors[name].detach()
        optimizer.step(1.0 / step)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad", "muon"])
def test_left_out_options_are_torchs_defaults(name: str) -> None:
    found = build(OptimizerSpec(name=name, lr=0.5), parameters())[0]  # type: ignore[arg-type]
    matrices = [torch.zeros(2, 2, requires_grad=True)]
    cls: Any = type(found)
    assert found.defaults == cls(matrices, lr=0.5).defaults


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad", "muon"])
@pytest.mark.parametrize("momentum", [None, 0.0, 0.9])
def test_a_spec_knows_what_is_kept_for_a_parameter(name: Any, momentum: float | None) -> None:
    if momentum is not None and name not in ("sgd", "muon"):
        return
    spec, tensors = OptimizerSpec(name=name, momentum=momentum), parameters()
    optimizer = FragmentOptimizer(spec, tensors)
    train(optimizer, tensors, [1])
    kept = [slot for slot, of, value in optimizer.state() if of == "matrix" and value.shape == tensors[of].shape]
    assert len(kept) == spec.slots


def test_muon_leaves_vectors_to_adamw() -> None:
    muon, adamw = build(OptimizerSpec(name="muon", lr=0.5, weight_decay=0.3, momentum=0.8), parameters())
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [tuple(parameter.shape) for parameter in muon.param_groups[0]["params"]] == [(4, 3), (2, 2)]
    assert [tuple(parameter.shape) for parameter in adamw.param_groups[0]["params"]] == [(3,)]
    assert adamw.defaults["lr"] == 0.5
    assert adamw.defaults["weight_decay"] == muon.defaults["weight_decay"] == 0.3


def test_a_fragment_without_parameters_has_nothing_to_do() -> None:
    optimizer = FragmentOptimizer(OptimizerSpec(), {})
    optimizer.step(1.0)
    assert list(optimizer.state()) == []


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adagrad", "muon"])
def test_state_comes_back_bit_for_bit(name: str) -> None:
    spec = OptimizerSpec(name=name, lr=0.1, momentum=0.9 if name in ("sgd", "muon") else None)  # type: ignore[arg-type]
    tensors = parameters()
    whole = FragmentOptimizer(spec, tensors)
    train(whole, tensors, [1, 2])
    state = {(slot, parameter): value.clone() for slot, parameter, value in whole.state()}
    resumed_tensors = {key: value.detach().clone().requires_grad_() for key, value in tensors.items()}
    resumed = FragmentOptimizer(spec, resumed_tensors)
    resumed.load(state)
    train(whole, tensors, [3, 4])
    train(resumed, resumed_tensors, [3, 4])
    assert all(torch.equal(tensors[key], resumed_tensors[key]) for key in tensors)
    after = {(slot, parameter): value for slot, parameter, value in whole.state()}
    found = {(slot, parameter): value for slot, parameter, value in resumed.state()}
    assert found.keys() == after.keys()
    assert all(torch.equal(found[key], after[key]) for key in after)
    assert ("step", "vector") in after or name == "sgd"
    assert all(tensor.grad is None for tensor in tensors.values())
