"""What forward or the loss leaves in Python for the next call is refused when it matters, and left alone when not."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dag.capture import Captured, capture
from fusion.errors import CaptureError

EXAMPLE = {"inputs": torch.randn(4, 6), "targets": torch.tensor([0, 1, 2, 0])}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)


class Truncated(nn.Module):
    """A recurrent layer that goes on from where the last micro-batch ended."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.state = nn.LSTM(6, 3), None

    def forward(self, x: Tensor) -> Tensor:
        output, (h, c) = self.lstm(x[None], self.state)
        self.state = (h.detach(), c.detach())  # here
        return output[0]  # type: ignore[no-any-return]


class PlainTensor(Base):
    def __init__(self) -> None:
        super().__init__()
        self.center = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        output = self.linear(x)
        self.center = self.center * 0.5 + output.detach().mean(0)  # here
        return output - self.center  # type: ignore[no-any-return]


class Memory(Base):
    """Its list is changed, not replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        output = self.linear(x) + sum(self.memory)
        self.memory.append(output.detach())  # here
        return output  # type: ignore[no-any-return]


class FirstBatch(Base):
    """The same data gives the same loss again; other data does not."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.mean(0)  # here
        return self.linear(x - self.mean)  # type: ignore[no-any-return]


class Warming(Base):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1  # here
        return self.linear(x) * min(1.0, self.calls / 10)  # type: ignore[no-any-return]


class Late(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        output = self.linear(x)
        self.late = output.detach().mean(0)  # here
        return output - self.late  # type: ignore[no-any-return]


class LayerDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        if random.random() < 0.5:  # here
            return self.linear(x)  # type: ignore[no-any-return]
        return -self.linear(x)  # type: ignore[no-any-return]


class Noise(Base):
    def forward(self, x: Tensor) -> Tensor:
        scale = float(np.random.rand())  # here
        return self.linear(x) * scale  # type: ignore[no-any-return]


class FixedNoise(Base):
    """The same numbers in each call, by itself."""

    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)  # here
        return self.linear(x + torch.randn(6))  # type: ignore[no-any-return]


class OwnGenerator(Base):
    def __init__(self) -> None:
        super().__init__()
        self.random: Any = random.Random(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.random.random()  # type: ignore[no-any-return]  # here


class OwnNumpyGenerator(OwnGenerator):
    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.RandomState(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.random.rand()  # type: ignore[no-any-return]  # here


class Centered(nn.Module):
    """A loss with a moving centre."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3))
        self.center: Tensor

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(output - self.center, targets)
        self.center = self.center * 0.5 + output.detach().mean(0)  # here
        return loss


class CenteredInPlace(Centered):
    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(output - self.center, targets)
        with torch.no_grad():
            self.center.mul_(0.5).add_(output.mean(0))  # here
        return loss


class Annealed:
    """A loss that is an object, and no module."""

    def __init__(self) -> None:
        self.weight = 1.0

    def __call__(self, output: Tensor, targets: Tensor) -> Tensor:
        self.weight *= 0.5  # here
        return F.cross_entropy(output, targets) * self.weight


def taken(model: nn.Module, loss: Any = "cross_entropy") -> Captured:
    return capture(model, EXAMPLE, loss)


@pytest.mark.parametrize(
    ("model", "loss", "says"),
    [
        (Truncated, None, "forward changes state,.* register_buffer in __init__"),
        (PlainTensor, None, "forward changes center,"),
        (Memory, None, "forward changes memory,"),
        (FirstBatch, None, "forward changes mean,"),
        (Warming, None, "forward changes calls,.*taken once"),
        (Late, None, "buffer late of Late, which is None"),
        (LayerDrop, None, "draws from Python's random"),
        (Noise, None, "draws from numpy.random"),
        (FixedNoise, None, "forward seeds torch's random numbers"),
        (OwnGenerator, None, "forward changes random,"),
        (OwnNumpyGenerator, None, "forward changes random,"),
        (Base, Centered, "the loss assigns its buffer center; .*into the model"),
        (Base, CenteredInPlace, "the loss writes its buffer center in place.*into the model"),
        (Base, Annealed, "the loss changes weight of the loss.*into the model"),
    ],
)
def test_what_the_next_call_depends_on(
    model: Callable[[], nn.Module], loss: Callable[[], Any] | None, says: str
) -> None:
    made = model() if model is not Base else nn.Linear(6, 3)
    with pytest.raises(CaptureError) as caught:
        taken(made, loss() if loss is not None else "cross_entropy")
    message = str(caught.value)
    assert re.search(says, message), message
    assert "\n" not in message
    place = re.match(r"(.+):(\d+): ", message)
    assert place, message
    with open(__file__) as source:
        line = source.read().splitlines()[int(place[2]) - 1]
    assert place[1] == __file__
    assert line.endswith("# here"), f"{message}\npoints at: {line}"


def test_the_attribute_of_a_module_within_is_named_in_full() -> None:
    with pytest.raises(CaptureError, match=r"forward changes 1\.state,"):
        taken(nn.Sequential(nn.Linear(6, 6), Truncated()))


class Looked(Base):
    """Keeps what somebody may want to look at, a mask that is always the same, and a count of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None
        self.seen: dict[str, list[Tensor]] = {"outputs": []}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.mask is None:
            self.mask = torch.tril(torch.ones(6, 6))
        self.last = self.linear(F.dropout(x, 0.5) @ self.mask)
        self.seen["outputs"].append(self.last)
        return self.last  # type: ignore[no-any-return]


def test_what_no_call_depends_on_stays_and_is_put_back() -> None:
    model = Looked()
    dag = taken(model).dag
    assert (model.calls, model.mask, model.seen) == (0, None, {"outputs": []})
    assert not hasattr(model, "last")
    (note,) = dag.notes
    assert "calls" in note
    assert "mask" not in note


class Averaging(Base):
    """Assigns its buffer, which training keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        self.last = x
        return self.linear(x - self.mean)  # type: ignore[no-any-return]


def test_a_buffer_of_the_model_may_be_assigned() -> None:
    model = Averaging()
    found = taken(model).dag
    assert any(found.ops[target].target == "mean" for op in found.ops for target in op.mutates)
    assert found.notes == ()
    assert torch.equal(model.mean, torch.zeros(6))


def test_without_numbers_only_what_needs_none_is_refused() -> None:
    with torch.device("meta"):
        assert "calls" in taken(Warming()).dag.notes[0]
        assert taken(FirstBatch()).dag.notes == ()
        with pytest.raises(CaptureError, match="Python's random"):
            taken(LayerDrop())


def test_random_numbers_are_where_they_were() -> None:
    python, numpy, ours = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for model in (LayerDrop(), Noise(), Looked(), OwnGenerator()):
        python, numpy, ours = random.getstate(), np.random.get_state(), torch.get_rng_state()
        with contextlib.suppress(CaptureError):
            taken(model)
        assert random.getstate() == python
        assert repr(np.random.get_state()) == repr(numpy)
        assert torch.equal(torch.get_rng_state(), ours)


class Looks(nn.Module):
    """Keeps what it saw, and has too small a table for some data."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return self.table(x)


def test_what_fails_on_the_numbers_is_not_passed_over_in_silence() -> None:
    targets = torch.zeros(3, 2)
    assert capture(Looks(), {"inputs": torch.tensor([0, 1, 2]), "targets": targets}, "mse").dag.notes == ()
    (note,) = capture(Looks(), {"inputs": torch.tensor([0, 1, 9]), "targets": targets}, "mse").dag.notes
    assert note.startswith("forward changes seen; whether its next call depends on it can't be tried: IndexError")
