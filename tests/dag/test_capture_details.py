"""What capture makes of single constructs: writes in place, frozen parameters, constants, autocast, contexts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from dag_cases import CASES, Case, assert_same_bits, captured
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dag.capture import Captured, capture
from dag.capture.objective import cross_entropy


class Model(nn.Module):
    """A linear layer and a buffer, with a forward given by the test."""

    def __init__(self, body: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.register_buffer("average", torch.zeros(4))
        self.body = [body]

    def forward(self, x: Tensor) -> Tensor:
        return self.body[0](self, x)


def check(body: Callable[[Model, Tensor], Tensor], autocast: str | None = None) -> Captured:
    """Capture a model with this forward (the loss is its mean), and compare with eager."""
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = Model(body)
    found = capture(
        model, {"inputs": x, "targets": x}, lambda output, targets: output.float().mean(), autocast=autocast
    )

    def eager(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            return model(x).float().mean()  # type: ignore[no-any-return]

    assert_same_bits(found.dag, found.tensors, Case(model, {"inputs": x}, "model", eager))
    return found


def targets_of(found: Captured) -> list[str]:
    return [op.target for op in found.dag.ops if op.kind == "call"]


def writers(found: Captured) -> list[str]:
    return [op.target for op in found.dag.ops if op.mutates]


def test_writes_that_nobody_else_sees_become_functional() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        h = model.linear(x)
        h += 1
        F.dropout(h.mul_(2), 0.5, inplace=True)
        return h.relu_()

    found = check(body)
    assert not writers(found)
    assert {"aten.add.Tensor", "aten.mul.Tensor", "aten.relu.default", "aten.dropout.default"} <= set(targets_of(found))


def test_a_write_that_a_view_sees_stays_in_place() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        h = model.linear(x)
        row = h[0]
        h.add_(1)
        return h.sum(0) + row

    found = check(body)
    assert writers(found) == ["aten.add_.Tensor"]
    written = next(op for op in found.dag.ops if op.mutates)
    assert {found.dag.ops[op].target for op in written.mutates} == {"aten.linear.default", "aten.select.int"}


def test_assigning_to_a_slice_stays_in_place() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        h = torch.empty(2, 4).fill_(1.0)
        h[:, 0] = x[:, 1]
        return model.linear(h)

    found = check(body)
    assert "aten.copy_.default" in writers(found)
    assert not any("empty" in target for target in targets_of(found)), "uninitialised memory becomes zeros"


def test_assigning_a_whole_tensor_keeps_its_gradient() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        h = torch.zeros(2, 4)
        h[:] = model.linear(x)
        return h.relu()

    found = check(body)
    assert writers(found) == ["aten.copy_.default"]


def test_a_write_that_would_promote_stays_in_place() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        h = model.linear(x).bfloat16()
        h.add_(x)
        return h

    assert writers(check(body)) == ["aten.add_.Tensor"]


def test_a_write_without_gradient_to_a_value_with_gradient_stays_in_place() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        h = model.linear(x)
        with torch.no_grad():
            h.mul_(2)
        return h + 1

    assert writers(check(body)) == ["aten.mul_.Tensor"]


def test_a_write_whose_derivative_rounds_otherwise_stays_in_place() -> None:
    found = check(lambda model, x: F.elu(model.linear(x), inplace=True))
    assert writers(found) == ["aten.elu_.default"]


def test_what_is_given_as_out_is_written() -> None:
    found = check(lambda model, x: F.normalize(x, out=torch.empty(2, 4)) * model.linear(x))
    assert "aten.div.Tensor" in targets_of(found)
    assert "aten.div.out" not in targets_of(found)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_writes_its_vectors(norm: Callable[[nn.Module], nn.Module]) -> None:
    def run(model: Model, x: Tensor) -> Tensor:
        return model.linear(x)

    model = Model(run)
    model.linear = norm(nn.Linear(4, 4))
    found = capture(model, {"inputs": torch.randn(2, 4), "targets": torch.zeros(2, 4)}, "mse")
    written = {op.target for op in found.dag.ops if op.id in found.dag.written and op.kind == "buffer"}
    assert len(written) == 2


def test_distributions_are_captured_without_their_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    # torch.compile turns them off for good.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)

    def run(model: Model, x: Tensor) -> Tensor:
        mean = model.linear(x)
        return torch.distributions.Normal(mean, mean.exp()).log_prob(x)

    check(run)
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(torch.zeros(1), torch.full((1,), -1.0))


class Turned(torch.autograd.Function):
    """Has a derivative that torch would not take."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class Closing(torch.autograd.Function):
    """Uses parameters that are none of its arguments: they get no gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor, layer: nn.Module) -> Tensor:
        return torch.tanh(layer(x))  # type: ignore[no-any-return]


def test_a_custom_function_through_which_no_gradient_goes() -> None:
    def of_data(model: Model, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = Turned.apply(model.linear.weight)
        return Turned.apply(x) @ weight + model.linear(x) + Closing.apply(x, model.linear)  # type: ignore[no-any-return]

    check(of_data)


def test_what_a_beta_distribution_draws() -> None:
    def mixup(model: Model, x: Tensor) -> Tensor:
        share = torch.distributions.Beta(torch.tensor(0.4), torch.tensor(0.4)).sample()
        return model.linear(share * x + (1 - share) * x[torch.randperm(len(x))])

    torch.manual_seed(0)
    x = torch.randn(2, 4)
    found = capture(Model(mixup), {"inputs": x, "targets": x}, "mse")
    drawn = {op.target for op in found.dag.ops if op.random}
    assert drawn == {"aten._sample_dirichlet.default", "aten.randperm.default"}


@pytest.mark.parametrize(
    "body",
    [
        lambda model, x: F.interpolate(model.linear(x)[:, None, :], scale_factor=2, mode="nearest-exact"),
        lambda model, x: F.interpolate(model.linear(x)[None, None], (2, 2), mode="bilinear", antialias=True),
        lambda model, x: model.linear(x).quantile(0.3, 1),
        lambda model, x: torch.linalg.svdvals(model.linear(x)),
    ],
)
def test_operators_that_look_like_others_that_are_refused(body: Callable[[Model, Tensor], Tensor]) -> None:
    check(body)


def test_input_data_that_is_written_is_copied_first() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        x = x.clone() if not torch.compiler.is_exporting() else x
        x.mul_(2)
        return model.linear(x)

    found = check(body)
    assert not found.dag.written & {op.id for op in found.dag.placeholders}


@pytest.mark.parametrize("assign", [False, True])
def test_buffers_are_written(assign: bool) -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        h = model.linear(x)
        if assign:
            model.average = model.average * 0.9 + h.detach().mean(0)
        else:
            model.average.mul_(0.9).add_(h.detach().mean(0))
        return h + model.average

    found = check(body)
    buffer = next(op for op in found.dag.ops if op.kind == "buffer")
    assert buffer.id in found.dag.written
    assert found.dag.persistent_buffers == ("average",)


def test_unused_values_and_inputs_are_left_out() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        model.other(x).sum()
        return model.linear(x)

    found = check(body)
    assert [parameter.name for parameter in found.dag.parameters] == ["linear.weight", "linear.bias"]
    assert [op.target for op in found.dag.placeholders] == ["inputs"]
    assert "other.weight" in found.tensors


def test_checkpointing_is_inlined() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        h = checkpoint(lambda value: model.linear(value).relu(), x, use_reentrant=False)
        assert isinstance(h, Tensor)
        return h

    assert "aten.relu.default" in targets_of(check(body))


def test_one_hot_and_integer_indexing() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        chosen = F.one_hot(x.argmax(1), 4).float()
        return model.linear(x)[torch.tensor([1, 0, 1])].sum(0) * chosen

    check(body)


def test_tensor_literals_become_constants_under_their_own_names() -> None:
    found = check(lambda model, x: model.linear(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]))
    constants = [op.target for op in found.dag.ops if op.kind == "constant"]
    assert len(constants) == 1
    assert constants[0].startswith("constant/")
    assert found.tensors[constants[0]].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_frozen_parameters_are_buffers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    found = capture(model, {"inputs": torch.randn(2, 4), "targets": torch.randn(2, 4)}, "mse")
    assert [parameter.name for parameter in found.dag.parameters] == ["0.bias", "1.weight", "1.bias"]
    assert [parameter.order for parameter in found.dag.parameters] == [1, 2, 3]
    assert found.dag.persistent_buffers == ("0.weight",)


def test_a_module_used_twice_has_its_buffers_under_both_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.append(model[1])
    found = capture(model, {"inputs": torch.randn(2, 4), "targets": torch.randn(2, 4)}, "mse")
    assert dict(found.dag.buffer_aliases)["1.running_mean"] == ("3.running_mean",)
    weight = next(parameter for parameter in found.dag.parameters if parameter.name == "1.weight")
    assert weight.aliases == ("3.weight",)


def test_a_loss_module_with_weights() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    found = capture(
        nn.Linear(4, 4),
        {"inputs": torch.randn(2, 4), "targets": torch.tensor([1, 2])},
        nn.CrossEntropyLoss(weight=weight),
    )
    (constant,) = [op for op in found.dag.ops if op.kind == "constant"]
    assert torch.equal(found.tensors[constant.target], weight)
    assert set(found.tensors) == {"weight", "bias", constant.target}


def test_one_tensor_under_two_names_is_two_inputs() -> None:
    """Traced as it is, the graph would read the ids from the labels."""
    case, found = captured("hf gpt2")
    assert case.example["input_ids"] is case.example["labels"]
    assert sorted(op.target for op in found.dag.placeholders) == ["input_ids", "labels"]


def test_a_model_in_evaluation_mode_is_captured_for_training_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    found = capture(model, {"inputs": torch.randn(2, 4), "targets": torch.randn(2, 4)}, "mse")
    assert any(op.random for op in found.dag.ops)
    assert not model.training
    assert not model[1].training


def test_frozen_batch_norm_stays_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].eval()
    found = capture(model, {"inputs": torch.randn(2, 4), "targets": torch.randn(2, 4)}, "mse")
    assert not found.dag.written


def test_a_model_without_memory_is_captured() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 1000))
    found = capture(model, {"inputs": torch.zeros(2, 8).long(), "targets": torch.zeros(2, 8).long()}, "cross_entropy")
    assert sum(op.flops for op in found.dag.ops) == 2 * 2 * 8 * 64 * 1000


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_recurrent_layers_count_every_position(cell: type[nn.RNNBase]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell(8, 16, batch_first=True)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.cell(inputs)[0]

    length, batch, gates = 5, 2, 4 if cell is nn.LSTM else 3
    found = capture(
        Model(), {"inputs": torch.randn(batch, length, 8), "targets": torch.randn(batch, length, 16)}, "mse"
    )
    (op,) = [op for op in found.dag.ops if op.flops]
    assert op.flops == 2 * length * batch * gates * 16 * (8 + 16)
    assert op.backward_flops >= 1.5 * op.flops


def test_strict_tracing_takes_over_where_the_other_fails() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        return model.linear(x) * torch.from_numpy(x.numpy())

    check(body)


def test_strict_tracing_of_tied_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.export.export

    def only_strict(*args: object, strict: bool, **options: object) -> object:
        if not strict:
            raise RuntimeError("not this time")
        return real(*args, strict=True, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.export, "export", only_strict)
    torch.manual_seed(0)
    case = CASES["gpt tied"]()
    found = capture(case.model, case.example, case.loss)
    assert_same_bits(found.dag, found.tensors, case)
    assert found.dag.parameters[0].aliases == ("head.weight",)


def test_class_axis_of_cross_entropy() -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.equal(cross_entropy(logits, labels), expected)
    assert torch.equal(cross_entropy(logits.transpose(1, 2), labels), F.cross_entropy(logits.transpose(1, 2), labels))


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ((5, 7), torch.rand(5, 7)),
        ((5, 7), torch.randint(7, (5,)).to(torch.uint8)),
        ((7,), torch.tensor(3)),
        ((7,), torch.rand(7)),
        ((2, 7, 3, 3), torch.randint(7, (2, 3, 3))),
        ((2, 7, 3, 3), torch.rand(2, 7, 3, 3)),
    ],
)
def test_what_torch_takes_for_cross_entropy_is_taken(shape: tuple[int, ...], targets: Tensor) -> None:
    logits = torch.randn(shape)
    assert torch.equal(cross_entropy(logits, targets), F.cross_entropy(logits, targets))


@pytest.mark.parametrize("family", ["gpt tied", "resnet18", "moe", "hf gpt2", "hf llama"])
def test_autocast_gives_the_bits_of_eager_autocast(family: str) -> None:
    torch.manual_seed(0)
    case = CASES[family]()
    found = capture(case.model, case.example, case.loss, autocast="bfloat16")

    def eager(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.eager(model)

    assert found.dag.autocast == "bfloat16"
    assert_same_bits(found.dag, found.tensors, case, eager)


def test_autocast_regions_of_the_models_own() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = model.linear(x)
            with torch.autocast("cpu", enabled=False):
                h = h + model.other(h.float())
            h = model.linear(h)
        return h + model.linear(x)

    found = check(body)
    casts = [op for op in found.dag.ops if op.kind == "call" and op.name.startswith("p_model_linear_weight_bfloat16")]
    assert len(casts) == 1, "the cast of a weight is made once in a region, as autocast's cache does"


@pytest.mark.parametrize("lowered", [False, True])
def test_autocast_of_an_operator_that_casts_its_arguments_itself(lowered: bool) -> None:
    """Attention with a bias that is trained computes in float32 what it gets in bfloat16."""

    def body(model: Model, x: Tensor) -> Tensor:
        h = model.linear(x).view(2, 1, 2, 2)
        bias = model.other.weight.view(4, 2, 2)[:1] * 2.0
        return F.scaled_dot_product_attention(h, h, h, attn_mask=bias.to(h.dtype) if lowered else bias)

    found = check(body, autocast="bfloat16")
    attention = next(op for op in found.dag.ops if op.target == "aten.scaled_dot_product_attention.default")
    assert attention.meta.dtype == "bfloat16"


def test_autocast_switched_off_inside() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        h = model.linear(x)
        with torch.autocast("cpu", enabled=False):
            return model.other(h.float())

    check(body, autocast="bfloat16")


def test_outputs_of_one_call_stand_next_to_it() -> None:
    def body(model: Model, x: Tensor) -> Tensor:
        first, second = model.linear(x).chunk(2, dim=1)
        return (first + 1) * second

    found = check(body)
    names = targets_of(found)
    at = names.index("aten.chunk.default")
    assert names[at + 1 : at + 3] == ["py.getitem", "py.getitem"]


def test_names_of_data_keys_are_placeholders() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, left: Tensor, *, right: Tensor) -> Mapping[str, Tensor]:
            return {"loss": self.linear(left - right).mean()}

    example = {"right": torch.randn(2, 4), "left": torch.randn(2, 4)}
    found = capture(Two(), example, "model")
    assert {op.target: op.name for op in found.dag.placeholders} == {"left": "left", "right": "right"}
