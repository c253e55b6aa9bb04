"""The OP-DAG is compared with the model on the first micro-batch, in training and in evaluation."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag.capture import capture
from fusion.data import prepare_object
from fusion.errors import CaptureError
from fusion.spec_file import spec_from
from fusion.submit import captured
from fusion.trial import compare_training, compared_parameters, evaluating, try_once

EXAMPLE = {"inputs": torch.linspace(-1, 1, 32).reshape(4, 8), "targets": torch.tensor([0, 1, 2, 0])}
SCALE = [1.0]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)


class DropPath(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * x.new_empty(len(x), 1).bernoulli_(0.5).div_(0.5)
        return self.linear(x)


class Scaled(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.training else self.linear(x) * 2


class Moving(Base):
    """Updates its own average in training alone, as a codebook does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return self.linear(x - self.mean)


class Faint(Base):
    """As layer scale: when the model is new, what its masks do is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((8,), 1e-9))
        self.mask = Mask()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.mask(torch.tanh(x)) * self.scale)


class Mask(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty(len(x), 1).bernoulli_(0.5).div_(0.5) if getattr(self, "training") else x  # noqa: B009


class ByValue(Base):
    """Looks at a number in evaluation alone."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and x.sum() < 100:  # here
            x = x * 2
        return self.linear(x)


class Untrained(Base):
    """Has a layer for evaluation alone, which nobody trains."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if self.training else self.other(x)  # here


class Merging(Base):
    """As layers of LoRA: `eval()` adds a product to the weights, which `train()` takes out again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear.weight.requires_grad_(False)
        self.first, self.second = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2, 8))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        if self.merged == mode:
            self.linear.weight.data += (self.first @ self.second) * (-1 if mode else 1)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.linear(x)
        return self.linear(x) + x @ self.second.T @ self.first.T


class TwoHeads(Base):
    """Returns another thing in evaluation."""

    def forward(self, x: Tensor) -> Any:
        output = self.linear(x)
        return (output, output) if self.training else output


class Usual(Base):
    """What evaluation knows: dropout, batch norm, and an encoder that takes a fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(8), nn.BatchNorm1d(8).eval()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.frozen(self.norm(x)), 0.5, self.training)
        return self.linear(self.encoder(h[None])[0])


class AlwaysRandom(Base):
    """As a variational model: random in evaluation as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + torch.randn_like(x))


class FromOutside(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * SCALE[0]


class RandomFromOutside(FromOutside):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(F.dropout(x + torch.randn_like(x), 0.1, self.training)), 0.5, self.training)


class Detached(RandomFromOutside):
    """What is outside decides over a gradient alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return super().forward(x.detach() if SCALE[0] > 1 else x) / SCALE[0]


class ThrowsAway(RandomFromOutside):
    """Draws numbers that come to nothing, which the OP-DAG leaves out."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return super().forward(x)


def both_losses(output: Any, targets: Tensor) -> Tensor:
    first, second = output
    return F.cross_entropy(first, targets) + F.cross_entropy(second, targets)


@pytest.mark.parametrize("model", [DropPath, Scaled, Moving, Faint])
def test_an_evaluation_that_is_another_computation(model: type[nn.Module]) -> None:
    """Told by its branch too, where it does little on the first micro-batch."""
    made = model()
    alone = capture(made, EXAMPLE, "cross_entropy")
    found = evaluating(made, "cross_entropy", EXAMPLE, alone)
    assert found.dag.rewired
    assert evaluating(made, "cross_entropy", EXAMPLE, found) is not alone
    compare_training(found, EXAMPLE, try_once(made, "cross_entropy", EXAMPLE))


def test_an_evaluation_that_is_nearly_the_same_at_first() -> None:
    """Spectral norm's vectors fit its weights when it is made; training writes them, and evaluation does not."""
    made = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Linear(6, 3))
    alone = capture(made, EXAMPLE, "cross_entropy")
    state = {name: value.clone() for name, value in made.state_dict().items()}
    found = evaluating(made, "cross_entropy", EXAMPLE, alone)
    assert {op.only_in for op in found.dag.ops} == {"", "training"}
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in found.tensors.items() if name in state)


def test_weights_that_are_others_in_evaluation() -> None:
    made = Merging()
    weight = made.linear.weight.clone()
    alone = capture(made, EXAMPLE, "cross_entropy")
    assert evaluating(made, "cross_entropy", EXAMPLE, alone) is alone
    assert made.training
    assert not made.merged
    assert torch.allclose(made.linear.weight, weight, atol=1e-6)


@pytest.mark.parametrize(("model", "says"), [(ByValue, "Python needs a tensor's value"), (Untrained, "does not use")])
def test_an_evaluation_that_can_not_be_captured(model: type[nn.Module], says: str) -> None:
    made = model()
    found = capture(made, EXAMPLE, "cross_entropy")
    with pytest.raises(CaptureError) as caught:
        evaluating(made, "cross_entropy", EXAMPLE, found)
    message = str(caught.value)
    assert "\n" not in message
    assert "evaluation would be wrong" in message
    assert says in message
    assert "train.eval_every" in message
    place = re.match(r"(.+):(\d+): ", message)
    assert place is not None
    with open(__file__) as source:
        assert source.read().splitlines()[int(place[2]) - 1].endswith("# here")


def test_a_model_that_fails_in_evaluation() -> None:
    model = TwoHeads()
    found = capture(model, EXAMPLE, both_losses)
    with pytest.raises(CaptureError, match=r"fails in evaluation mode .*leave out train\.eval_every"):
        evaluating(model, both_losses, EXAMPLE, found)


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize("model", [Usual, AlwaysRandom])
def test_an_evaluation_that_is_right(model: type[nn.Module], autocast: str | None) -> None:
    torch.manual_seed(0)
    made = model()
    found = capture(made, EXAMPLE, "cross_entropy", autocast=autocast)
    modes = {name: module.training for name, module in made.named_modules()}
    state = {name: value.clone() for name, value in made.state_dict().items()}
    drawn = torch.get_rng_state()
    evaluating(made, "cross_entropy", EXAMPLE, found)
    compare_training(found, EXAMPLE, try_once(made, "cross_entropy", EXAMPLE, autocast))
    assert {name: module.training for name, module in made.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("kind", [FromOutside, RandomFromOutside])
def test_what_forward_takes_from_outside(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = kind()
    found = capture(model, EXAMPLE, "cross_entropy")
    compare_training(found, EXAMPLE, try_once(model, "cross_entropy", EXAMPLE))
    monkeypatch.setattr(f"{__name__}.SCALE", [3.0])
    with pytest.raises(CaptureError, match="outside the model"):
        compare_training(found, EXAMPLE, try_once(model, "cross_entropy", EXAMPLE))


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_gradients_that_are_others(autocast: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Detached()
    found = capture(model, EXAMPLE, "cross_entropy", autocast=autocast)
    names = compared_parameters(found.dag)
    assert set(names) == {"linear.weight", "linear.bias", "first.weight", "first.bias"}
    tried = try_once(model, "cross_entropy", EXAMPLE, autocast, names)
    assert all(parameter.grad is None for parameter in model.parameters())
    compare_training(found, EXAMPLE, tried)
    monkeypatch.setattr(f"{__name__}.SCALE", [2.0])
    with pytest.raises(CaptureError, match=r"another gradient of first\.weight"):
        compare_training(found, EXAMPLE, try_once(model, "cross_entropy", EXAMPLE, autocast, names))
    # Without numbers there is nothing to compare.
    endless = {**EXAMPLE, "inputs": EXAMPLE["inputs"] * torch.inf}
    compare_training(found, endless, try_once(model, "cross_entropy", endless, autocast, names))


class Overwrites(Base):
    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.linear(x))
        twice = gate * gate
        gate += 1
        return twice + gate


def test_a_model_that_fails_in_backward() -> None:
    model = Overwrites()
    with pytest.raises(CaptureError, match=r"fails in backward on the first micro-batch: .*modified by an inplace"):
        try_once(model, "cross_entropy", EXAMPLE, None, ["linear.weight"])


def test_a_model_whose_gradients_take_much_memory_is_compared_by_its_loss() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 2**26), nn.Linear(2**26, 3))
    found = capture(model, EXAMPLE, "cross_entropy")
    assert not compared_parameters(found.dag)


def test_numbers_that_are_thrown_away_are_no_difference() -> None:
    model = ThrowsAway()
    found = capture(model, EXAMPLE, "cross_entropy")
    compare_training(found, EXAMPLE, try_once(model, "cross_entropy", EXAMPLE))


def test_a_trial_puts_attributes_back() -> None:
    class Counting(Base):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.linear(x)

    model = Counting()
    try_once(model, "cross_entropy", EXAMPLE)
    assert "calls" not in vars(model)


def job(model: nn.Module, **train: Any) -> Any:
    spec = spec_from(
        {
            "name": "trial",
            "model": {"entrypoint": "here:model"},
            "loss": "cross_entropy",
            "data": {"entrypoint": "here:data"},
            "train": {"steps": 2, "global_batch": 4, **train},
        },
        where="test",
    )
    data = {"inputs": np.ones((20, 8), np.float32), "targets": np.zeros(20, np.int64)}
    prepared = prepare_object(data, spec.train, holdout=0.5, forward=model.forward, loss_is_the_models=False)
    return captured(spec, model, "cross_entropy", prepared)


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("only_in_training", [False, True])
def test_trials_leave_a_teacher_that_follows_its_student_as_it_was(counts: bool, only_in_training: bool) -> None:
    class Distilled(Base):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(8, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            if counts:
                self.calls += 1
            if self.training or not only_in_training:
                with torch.no_grad():
                    self.teacher.weight.mul_(0.5).add_(self.linear.weight, alpha=0.5)
            return self.linear(x) - self.teacher(x)  # type: ignore[no-any-return]

    model = Distilled()
    before = model.teacher.weight.clone()
    made = job(model, eval_every=1)
    assert torch.equal(made.tensors["teacher.weight"], before)


def test_evaluation_that_writes_a_buffer_is_compared_from_what_the_buffer_was() -> None:
    class Always(Moving):
        def forward(self, x: Tensor) -> Tensor:
            self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
            return self.linear(x - self.mean)

    model = Always()
    assert not job(model, eval_every=1).dag.rewired
    assert not model.mean.any()


def test_only_a_job_that_evaluates_is_asked() -> None:
    assert not job(DropPath()).dag.rewired
    assert job(DropPath(), eval_every=1).dag.rewired
    job(ByValue())
    with pytest.raises(CaptureError, match="evaluation would be wrong"):
        job(ByValue(), eval_every=1)


@pytest.mark.parametrize(
    ("example", "says"),
    [
        (
            {"inputs": torch.tensor([[3, 250]]), "targets": torch.tensor([1])},
            r"module 0 \(Linear\): RuntimeError: .*; whole numbers go in as such: make inputs floats in the data, or in forward "
            r"\(the first micro-batch has inputs int64 \[1, 2\] from 3 to 250, targets int64 \[1\] from 1 to 1\)$",
        ),
        (
            {"inputs": torch.ones(2, 2), "targets": torch.tensor([1, 6])},
            r"IndexError: .* \(the first micro-batch has inputs float32 \[2, 2\], targets int64 \[2\] from 1 to 6\)$",
        ),
    ],
)
def test_data_that_does_not_fit_is_told_with_what_it_is(example: dict[str, Tensor], says: str) -> None:
    with pytest.raises(CaptureError, match=r"^the model fails on the first micro-batch: " + says):
        try_once(nn.Sequential(nn.Linear(2, 3)), "cross_entropy", example)
