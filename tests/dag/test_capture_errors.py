"""A model that can't be captured is refused with the user's line and what to change."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from dag.capture import blame, capture
from fusion.errors import CaptureError


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Branch(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h if h.sum() > 0 else -h  # here


class Item(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * x.sum().item()  # here


class Nonzero(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[torch.nonzero(x[:, 0])[:, 0]]  # here


class MaskedSelect(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.masked_select(self.linear(x), x > 0)  # here


class BooleanIndex(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[x > 0]  # here


class Complex(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.linear(x).double()).real.float()  # here


class Imaginary(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * 2j).imag  # here


class Sparse(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).to_sparse().to_dense()  # here


class Strided(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).as_strided((2, 2), (2, 1))  # here


class ControlFlow(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (self.linear(x),))  # here


class WrongShape(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) @ torch.ones(3, 3)  # here


class Variance(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.gaussian_nll_loss(self.linear(x), x, x.abs())  # here


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(1, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([4, 2])
        packed = pack_padded_sequence(x.unsqueeze(2), lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.recurrent(packed)  # here
        return pad_packed_sequence(out, batch_first=True)[0]


class Raises(Base):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("my own complaint")  # here


class WritesParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.mul_(0.9)  # here
        return self.linear(x)


class WritesData(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data.add_(1)  # here
        return self.linear(x)


class WritesAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.mean(0)  # here
        return self.linear(x) + self.total


class Generator(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.rand(4, generator=torch.Generator().manual_seed(3))  # here


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 3


class CustomFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(self.linear(x))  # here


class NoDerivative(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.heaviside(self.linear(x), x)  # here


class TensorHook(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        h.register_hook(lambda gradient: gradient * 2)  # here
        return h


class Reentrant(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.linear, x, use_reentrant=True)  # here


class InferenceMode(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            scale = x * 2
        return self.linear(x) * scale  # here


@torch.library.custom_op("fusion_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mapped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * row.norm())(self.linear(x))  # here


class TakesGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(self.linear(x).sin().sum(), x)[0]  # here


class GoesBack(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.sum().backward()  # here
        return y  # type: ignore[no-any-return]


class FunctionalGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: self.linear(x).sin().sum())(x)


class Renormalised(Base):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.embedding(x.long() * 0, self.linear.weight, max_norm=1.0)  # here


class CustomOperator(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + twice(x)  # here


def attempt(model: nn.Module, loss: object = lambda output, targets: output.mean()) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(model, {"inputs": torch.randn(2, 4), "targets": torch.zeros(2, 4)}, loss)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Branch, "torch.where"),
        (Item, "depends on a tensor's values|tensor's value"),
        (Nonzero, "shape depends on values"),
        (MaskedSelect, "shape depends on values"),
        (BooleanIndex, "shape depends on values"),
        (Complex, "complex128 are not supported; compute with complex64"),
        (Imaginary, r"a complex number in Python can't be captured; make it a tensor, as torch.tensor\(1j\)"),
        (Sparse, "sparse"),
        (Strided, "as_strided"),
        (ControlFlow, "torch.cond"),
        (WrongShape, "reduction dim"),
        (Variance, "gaussian_nll_loss can't be captured: .*write the loss out"),
        (Packed, r"module recurrent \(LSTM\) can't be captured: .*padded batch"),
        (Raises, "my own complaint"),
        (WritesParameter, "parameter linear.weight in place"),
        (WritesData, "register_buffer"),
        (WritesAttribute, "register_buffer"),
        (Generator, "torch.Generator"),
        (CustomFunction, "Twice is a custom torch.autograd.Function"),
        (NoDerivative, "no derivative of aten.heaviside.default"),
        (TensorHook, "hooks the gradient"),
        (TakesGradient, "takes a gradient"),
        (GoesBack, "takes a gradient"),
        (Reentrant, "use_reentrant=False"),
        (InferenceMode, "torch.no_grad"),
        (CustomOperator, "fusion_test.twice.default"),
        (Mapped, "it is of torch.func"),
        (Renormalised, "renormalises a parameter in place"),
    ],
)
def test_error_names_the_line_and_what_to_change(model: type[nn.Module], says: str) -> None:
    message = attempt(model())
    assert re.search(says, message), message
    place = re.match(r"(.+):(\d+): ", message)
    assert place, message
    assert place[1] == __file__
    with open(__file__) as source:
        line = source.read().splitlines()[int(place[2]) - 1]
    assert line.endswith("# here"), f"{message}\npoints at: {line}"


def test_gradients_of_functions_are_named_though_torch_tells_no_line() -> None:
    assert "it is of torch.func" in attempt(FunctionalGradient())


def within(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), module), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))),
            r"module 1\.1 \(Sequential\) .*TorchScript.*made from",
        ),
        (lambda: nn.BatchNorm1d(4, momentum=None), r"module 1\.1 \(BatchNorm1d\) .*momentum=None .*give a momentum"),
        (lambda: nn.BatchNorm2d(4, momentum=None), r"module 1\.1 \(BatchNorm2d\): .*expected 4D input"),
        (lambda: nn.Linear(3, 4), r"module 1\.1 \(Linear\): "),
        (
            lambda: nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.FractionalMaxPool2d(1, output_size=1), nn.Flatten()),
            r"module 1\.1\.1 \(FractionalMaxPool2d\): operator aten\.fractional_max_pool2d\.default ",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_where_no_line_is_the_user_s_the_module_is_named(make: Callable[[], nn.Module], says: str) -> None:
    assert re.match(says, attempt(within(make())))


def test_an_installed_library_s_line_is_named_where_none_is_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder may lie within the one that Python calls its standard library's."""
    monkeypatch.setattr(blame, "_LIBRARIES", (*blame._LIBRARIES, str(tmp_path)))
    file = tmp_path / "site-packages" / "branching.py"
    file.parent.mkdir()
    file.write_text("def branch(): return 1 / 0")
    spec = importlib.util.spec_from_file_location("branching", file)
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    with pytest.raises(ZeroDivisionError) as caught:
        library.branch()
    assert blame.line_of_exception(caught.value).startswith(__file__)
    assert blame.line_of_exception(caught.value.with_traceback(caught.tb.tb_next)) == f"{file}:1"


def test_nothing_to_train() -> None:
    assert "no parameter" in attempt(nn.Linear(4, 4).requires_grad_(False))


def test_loss_without_gradient() -> None:
    assert "does not depend on any parameter" in attempt(nn.Linear(4, 4), lambda output, targets: output.detach().sum())


def test_loss_that_is_no_scalar() -> None:
    assert "shape [2, 4]" in attempt(nn.Linear(4, 4), lambda output, targets: output - targets)


def test_loss_that_is_no_tensor() -> None:
    assert "type tuple" in attempt(nn.Linear(4, 4), lambda output, targets: (output, targets))


def test_loss_that_is_an_integer() -> None:
    assert "int64" in attempt(nn.Linear(4, 4), lambda output, targets: output.argmax())


def test_unknown_loss() -> None:
    assert "cross_entropy" in attempt(nn.Linear(4, 4), "crossentropy")


def test_mse_refuses_to_broadcast() -> None:
    assert "[2, 3]" in attempt(nn.Linear(4, 3), "mse")


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (torch.zeros(2), "the targets are float32; classes are whole numbers from 0 on: convert them to int64"),
        (torch.zeros(2, dtype=torch.bool), "the targets are bool; classes are whole numbers"),
        (
            torch.zeros(2, 1).long(),
            r"[2, 1]; it takes the number of a class for each row, of shape [2], or probabilities",
        ),
        (torch.zeros(2, 1).long(), "; drop the targets' last axis"),
        (torch.zeros(2, 3), "output has shape [2, 4] and the targets [2, 3]; it takes the number of a class"),
        (torch.zeros(2, 4).long(), "targets [2, 4], of int64; probabilities of classes are floats: convert them"),
    ],
)
def test_targets_that_are_no_classes(targets: Tensor, says: str) -> None:
    with pytest.raises(CaptureError, match=r"^loss cross_entropy: .*" + re.escape(says)):
        capture(nn.Linear(4, 4), {"inputs": torch.randn(2, 4), "targets": targets}, "cross_entropy")


def test_data_of_another_shape_than_the_model_takes_is_told() -> None:
    model = nn.Sequential(nn.Linear(5, 4))
    with pytest.raises(
        CaptureError, match=r"^module 0 \(Linear\): .*a micro-batch has inputs float32 \[2, 4\], targets int64"
    ):
        capture(model, {"inputs": torch.randn(2, 4), "targets": torch.zeros(2).long()}, "cross_entropy")


def test_a_loss_of_other_arguments() -> None:
    def lonely(output: Tensor) -> Tensor:
        return output.mean()

    class Lonely(nn.Module):
        def forward(self, output: Tensor) -> Tensor:
            return output.mean()

    for loss in (lonely, Lonely()):
        said = attempt(nn.Linear(4, 4), loss)
        assert re.match(
            r".*test_capture_errors.py:\d+: the loss is called as loss\(output, targets\), which it does", said
        )


def test_a_model_that_moves_to_a_gpu() -> None:
    class Moved(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.cuda())

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "each worker puts its piece on its own device" in attempt(Moved())


def test_losses_by_name_take_one_tensor() -> None:
    class Pair(Base):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x

    assert "loss mse: the model's output is of type tuple" in attempt(Pair(), "mse")


def test_model_loss_without_a_loss() -> None:
    class Pair(Base):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"output": self.linear(x)}

    with pytest.raises(CaptureError, match="without a loss"):
        capture(Pair(), {"inputs": torch.randn(2, 4)}, "model")


def test_missing_targets() -> None:
    with pytest.raises(CaptureError, match="no 'targets'"):
        capture(nn.Linear(4, 4), {"inputs": torch.randn(2, 4)}, "mse")


def test_forward_wants_an_argument_that_the_data_lacks() -> None:
    class Masked(Base):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.linear(x) * mask

    message = attempt(Masked())
    assert "mask" in message
    assert message.startswith(f"{__file__}:")


def test_parameter_hook() -> None:
    model = nn.Linear(4, 4)
    model.weight.register_hook(lambda gradient: gradient * 2)
    assert "weight has a gradient hook" in attempt(model)


def test_backward_hook_of_a_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_full_backward_hook(lambda module, before, after: None)
    assert "module 0 has a backward hook" in attempt(model)


def test_recurrent_layers_are_refused_under_autocast() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0].mean()  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="enabled=False"):
        capture(Recurrent(), {"inputs": torch.randn(2, 3, 4)}, "model", autocast="bfloat16")


def test_unknown_autocast() -> None:
    with pytest.raises(CaptureError, match="bfloat16"):
        capture(nn.Linear(4, 4), {"inputs": torch.randn(2, 4)}, "model", autocast="float8")


def test_capture_leaves_torch_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    apply, hook = torch.autograd.Function.apply, torch.Tensor.register_hook
    attempt(Branch())
    assert torch.autograd.Function.apply == apply
    assert torch.Tensor.register_hook is hook
    assert capsys.readouterr() == ("", "")
