"""What a branch on `self.training` does in evaluation is in the OP-DAG beside what training does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dag_cases import CPU
from torch import Tensor, nn

from dag.capture import Captured, capture, with_evaluation
from dag.capture.objective import Loss
from dag.cut import cut, cut_points
from dag.evaluation import evaluation_form
from dag.operators import run
from dag.serialize import dumps, loads
from fusion.errors import CaptureError

EXAMPLE = {"inputs": torch.linspace(-1, 1, 32).reshape(4, 8), "targets": torch.tensor([0, 1, 2, 0])}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)


class StochasticDepth(Base):
    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            rest = torch.relu(layer(x))
            if self.training:
                rest = rest * torch.empty(len(x), 1).bernoulli_(0.5).div_(0.5)
            x = x + rest
        return self.last(x)  # type: ignore[no-any-return]


class Variational(Base):
    def forward(self, x: Tensor) -> Tensor:
        mean, spread = self.first(x), self.second(x)
        z = mean + torch.randn_like(mean) * spread.exp() if self.training else mean
        return self.last(z)  # type: ignore[no-any-return]


class ScaledAtTheEnd(Base):
    """Evaluation computes more than training, with a parameter and with a table that training never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(1.0, 2.0, 8))
        self.register_buffer("passing", torch.ones(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.training:
            x = torch.sigmoid(x * self.table + self.passing) @ self.second.weight + torch.tensor([3.0])
        return self.last(self.second(x))  # type: ignore[no-any-return]


class Codebook(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return self.last(self.first(x - self.mean))  # type: ignore[no-any-return]


class TwoHeads(Base):
    def forward(self, x: Tensor) -> Any:
        early = self.first(x)
        late = self.last(torch.relu(early))
        return (late, self.last(early * 2)) if self.training else late


class OtherConstants(Base):
    """Constants of the two modes are named alike."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.tensor([1.0, 2.0]) if self.training else torch.tensor([3.0, 4.0])
        return self.last(self.first(x) * weights.repeat(4))  # type: ignore[no-any-return]


class WritesWhatItMade(Base):
    """In evaluation, a part of a tensor of its own is written."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.training:
            x = x * 2
            x[:, 2:4] = 1.0
            mask = torch.zeros(8)
            mask[:6] = 1.0
            x = x * mask
        return self.last(x)  # type: ignore[no-any-return]


class WritesThroughAView(Base):
    """The write is the same in both modes; what it writes is a copy in training, and what others read in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x * torch.ones(8).bernoulli_() if self.training else x
        view = y.view(2, 16)
        view.add_(1.0)
        return self.last(self.second(x) + y + view.view(4, 8))  # type: ignore[no-any-return]


class Usual(Base):
    """Flags alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.dropout(self.norm(self.first(x)), 0.5, self.training))  # type: ignore[no-any-return]


def heads(output: Any, targets: Tensor) -> Tensor:
    if isinstance(output, tuple):
        return F.cross_entropy(output[0], targets) + 0.3 * F.cross_entropy(output[1], targets)
    return F.cross_entropy(output, targets)


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)), nn.Linear(6, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Loss]] = {
    "stochastic depth": (StochasticDepth, "cross_entropy"),
    "variational": (Variational, "cross_entropy"),
    "scaled": (ScaledAtTheEnd, "cross_entropy"),
    "codebook": (Codebook, "cross_entropy"),
    "two heads": (TwoHeads, heads),
    "constants": (OtherConstants, "cross_entropy"),
    "spectral norm": (spectral, "cross_entropy"),
    "writes": (WritesWhatItMade, "cross_entropy"),
    "writes through a view": (WritesThroughAView, "cross_entropy"),
    "usual": (Usual, "cross_entropy"),
}


def found(model: nn.Module, loss: Loss = "cross_entropy") -> tuple[Captured, Captured]:
    alone = capture(model, EXAMPLE, loss)
    return alone, with_evaluation(alone, model, EXAMPLE, loss)


def evaluate(found: Captured) -> Tensor:
    values: dict[int, Any] = {}
    dag = loads(dumps(found.dag))
    with torch.no_grad():
        for op in dag.ops:
            form = evaluation_form(op, dag)
            if op.kind == "placeholder":
                values[op.id] = EXAMPLE[op.target]
            elif op.kind not in ("call", "loss"):
                values[op.id] = found.tensors[op.target].clone()
            elif form is not None:
                assert all(dag.ops[written].only_in == "evaluation" for written in form.mutates)
                values[op.id] = run(form, values, CPU)
    loss: Tensor = values[dag.loss.id]
    return loss


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_the_models_and_training_stays_as_it_was(name: str) -> None:
    make, loss = MODELS[name]
    torch.manual_seed(0)
    model = make()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    alone, both = found(model, loss)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    ours = [op for op in both.dag.training if op.kind in ("call", "loss")]
    usual = [op for op in alone.dag.ops if op.kind in ("call", "loss")]
    assert [(op.name, op.target, op.flops, op.saved_bytes, op.random) for op in ours] == [
        (op.name, op.target, op.flops, op.saved_bytes, op.random) for op in usual
    ]
    model.eval()
    with torch.no_grad():
        output = model(EXAMPLE["inputs"])
        expected = heads(output, EXAMPLE["targets"])
    assert torch.equal(evaluate(both), expected)
    assert (both.dag == alone.dag) == (name == "usual")


def test_what_is_where() -> None:
    dag = found(StochasticDepth())[1].dag
    assert {op.target for op in dag.ops if op.only_in == "training"} == {
        "aten.zeros.default", "aten.bernoulli_.float", "aten.div.Tensor", "aten.mul.Tensor",
    }  # fmt: skip
    assert [dag.ops[form.op].target for form in dag.rewired] == ["aten.add.Tensor"] * 2
    both = found(ScaledAtTheEnd())[1]
    alone = [op for op in both.dag.ops if op.only_in == "evaluation"]
    assert {op.target for op in alone} >= {"aten.sigmoid.default", "aten.matmul.default"}
    assert not any(op.requires_grad or op.flops for op in alone)
    assert {op.target for op in both.dag.ops if op.kind == "buffer"} == {"table", "passing"}
    assert both.dag.persistent_buffers == ("table",)
    constants = {op.target: both.tensors[op.target].tolist() for op in both.dag.ops if op.kind == "constant"}
    assert [3.0] in constants.values()


def test_of_several_that_are_alike_the_one_that_reads_the_same() -> None:
    dag = found(TwoHeads(), heads)[1].dag
    losses = [op for op in dag.ops if op.target == "aten.cross_entropy_loss.default"]
    assert [op.only_in for op in losses] == ["", "training"]
    assert [form.op for form in dag.rewired] == [dag.loss.id]


def test_constants_of_one_name_and_two_values() -> None:
    both = found(OtherConstants())[1]
    held = [both.tensors[op.target].tolist() for op in both.dag.ops if op.kind == "constant"]
    assert sorted(held) == [[1.0, 2.0], [3.0, 4.0]]


def test_stochastic_depth_may_still_be_cut_between_its_blocks() -> None:
    """A value that evaluation reads past the mask needs no edge of its own: only cuts within a mask go."""
    alone, both = found(StochasticDepth())
    everywhere = {point.position for point in cut_points(alone.dag)}
    legal = {point.position for point in cut_points(both.dag)}
    targets = [both.dag.ops[op].target for op in both.dag.body]
    assert legal < everywhere
    for position in range(1, len(targets)):
        if targets[position] in ("aten.linear.default", "aten.relu.default"):
            assert position in legal
    bytes_of = {point.position: point.forward_bytes for point in cut_points(alone.dag)}
    assert all(point.forward_bytes == bytes_of[point.position] for point in cut_points(both.dag))


@pytest.mark.parametrize("name", MODELS)
def test_every_fragment_has_what_its_ops_read_in_either_mode(name: str) -> None:
    make, loss = MODELS[name]
    dag = found(make(), loss)[1].dag
    for fragment in cut(dag, [point.position for point in cut_points(dag)]).fragments:
        there = {
            *fragment.ops, *fragment.placeholders, *fragment.parameters, *fragment.written_buffers, *fragment.constants,
            *(edge.value for edge in fragment.inputs),
        }  # fmt: skip
        for op in fragment.ops:
            form = evaluation_form(dag.ops[op], dag)
            assert there.issuperset(dag.ops[op].inputs())
            assert form is None or there.issuperset(form.inputs())


class ForEvaluationAlone(Base):
    """A parameter that nobody trains."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x if self.training else self.first(x))  # type: ignore[no-any-return]


class WritesInEvaluation(Codebook):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            x = x - self.mean.add_(1.0)
        return self.last(self.first(x))  # type: ignore[no-any-return]


class WritesABufferThroughAView(Codebook):
    """The write is the same in both modes; what it writes is a copy in training, and the buffer in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean * torch.ones(8).bernoulli_() if self.training else self.mean
        view = mean.view(2, 4)
        view.add_(1.0)
        return self.last(self.first(x) + mean + view.view(8))  # type: ignore[no-any-return]


class NeedsAValue(Base):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training and x.sum() > 0:
            x = x * 2
        return self.last(self.first(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (ForEvaluationAlone, "parameters that training does not use"),
        (WritesInEvaluation, "writes what training does not write"),
        (WritesABufferThroughAView, "writes what training does not write"),
        (NeedsAValue, "Python needs a tensor's value"),
    ],
)
def test_an_evaluation_that_can_not_be_captured(model: type[nn.Module], says: str) -> None:
    made = model()
    with pytest.raises(CaptureError, match=says):
        found(made)
    assert made.training
