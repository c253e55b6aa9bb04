"""Values and gradients lie on the far side of a cut as they lie in the uncut model, which decides how sums round."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from executor_models import Case, captured, plain_loop
from executor_pipeline import Pipeline, Settings, differing
from torch import Tensor, nn

from dag.cut import cut_points
from executor.layout import Layout, arranged, layouts


class Scaled(nn.Module):
    """A block as in ConvNeXt: its value is channels-last, the gradient of its value row-major."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.after = nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        values = self.before(inputs)
        inner = (self.scale * self.inner(values.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.after((values + inner).mean((-2, -1)))


class Turned(nn.Module):
    """The value between convolution and LSTM is row-major, its gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv1d(4, 4, 1)
        self.recurrent = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.after = nn.Linear(60, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.after(self.recurrent(self.before(inputs).transpose(1, 2))[0].flatten(1))


class Sliced(nn.Module):
    """The value before the last layer is a part of a wider one."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 13)
        self.after = nn.Linear(8, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.after(self.before(inputs).tanh()[:, 3:11])


def batch(*shape: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    return lambda generator: {
        "inputs": torch.randn(4, *shape, generator=generator),
        "targets": torch.randint(0, 5, (4,), generator=generator),
    }


MODELS = {"scaled": (Scaled, (3, 8, 8)), "turned": (Turned, (4, 5)), "sliced": (Sliced, (8,))}


@pytest.mark.parametrize("name", MODELS)
def test_bits_are_plain_pytorchs_wherever_the_model_is_cut(name: str) -> None:
    build, shape = MODELS[name]
    case = Case(build, nn.functional.cross_entropy, batch(*shape))
    losses, state, _ = plain_loop(
        case, steps=3, micro_batches=3, optimizer=lambda model: [torch.optim.AdamW(model.parameters(), 1e-2)]
    )
    made = case.captured()
    for point in cut_points(made.dag):
        run = Pipeline(made.dag, made.tensors, [point.position], Settings(steps=3, micro_batches=3))
        outcome = run.run(case.batch_of)
        assert outcome.losses == losses, point
        assert differing(outcome, state) == [], point


def test_where_values_and_gradients_lie() -> None:
    dag = Case(Sliced, nn.functional.cross_entropy, batch(8)).captured().dag
    (sliced,) = (op.id for op in dag.ops if op.target == "aten.slice.Tensor" and op.meta.shape == (4, 8))
    assert layouts(dag).values == {sliced: Layout((13, 1), 3)}
    assert layouts(dag).gradients == {}


def test_a_layout_with_gaps_and_a_beginning() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    found = arranged(values, Layout((7, 2), 3))
    assert torch.equal(found, values)
    assert found.stride() == (7, 2)
    assert found.storage_offset() == 3
    assert arranged(values, None) is values
    assert arranged(values, Layout((3, 1), 0)) is values
    assert arranged(torch.empty(0, 3), Layout((1, 9), 0)).shape == (0, 3)


def test_a_backward_that_fails_without_data_is_told_and_leaves_what_is_known_of_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("no such kernel")

    dag = captured("gpt").dag
    known = layouts(dag).values
    layouts.cache_clear()
    monkeypatch.setattr(Tensor, "backward", fail)
    found = layouts(dag)
    layouts.cache_clear()
    assert found.values == known
    assert not found.gradients
    assert "NotImplementedError: no such kernel" in caplog.text
