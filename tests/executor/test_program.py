"""One fragment's program: loading, state, borders, null gradients; and that ordering needs no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from executor_models import CASES, captured, random_cuts
from executor_pipeline import Pipeline, Settings, same
from torch import Tensor, nn

from dag.capture import capture
from dag.cut import cut, cut_points
from executor.gradients import add_in_order, own_gradients
from executor.program import FragmentProgram
from fusion.errors import BlobError, FrameError
from fusion.spec import LrScheduleSpec, OptimizerSpec


def programs(name: str, cuts: list[int], **options: Any) -> list[FragmentProgram]:
    made = captured(name)
    defaults: dict[str, Any] = {
        "seed": 0,
        "micro_batches": 2,
        "optimizer": OptimizerSpec(name="sgd", lr=0.1),
        "lr_schedule": LrScheduleSpec(),
        "steps": 5,
    }
    found = [FragmentProgram(made.dag, fragment, **(defaults | options)) for fragment in cut(made.dag, cuts).fragments]
    for program in found:
        program.load(made.tensors)
    return found


def read_only(value: Tensor) -> Tensor:
    """The same values in memory that must not be written to, as a received frame's."""
    array = value.numpy().copy()
    array.flags.writeable = False
    return torch.from_numpy(array)


def test_a_program_asks_only_for_its_own_tensors() -> None:
    made = captured("gpt")
    parts = programs("gpt", random_cuts(made.dag, 4, 0))
    names = [name for part in parts for name in part.parameter_names]
    assert sorted(names) == sorted(parameter.name for parameter in made.dag.parameters)
    for part in parts:
        assert set(part.parameter_names) <= set(part.state_names) <= set(made.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "hold no tensor"),
        (lambda tensors, name: tensors.update({name: torch.zeros(3)}), "the OP-DAG says"),
        (lambda tensors, name: tensors.update({name: tensors[name].double()}), "the OP-DAG says"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: Callable[[dict[str, Tensor], str], object], message: str) -> None:
    made = captured("gpt")
    program = programs("gpt", [])[0]
    tensors = dict(made.tensors)
    change(tensors, "norm.weight")
    with pytest.raises(BlobError, match=f"norm.weight.*{message}|{message}.*norm.weight"):
        program.load(tensors)


def test_loading_copies() -> None:
    made = captured("gpt")
    before = {name: value.clone() for name, value in made.tensors.items()}
    program = programs("gpt", [])[0]
    program.forward(1, 0, {}, CASES["gpt"].batch_of(1, 0))
    program.backward(1, 0, {})
    state = program.state()
    program.update(1, None)
    assert all(same(value, made.tensors[name]) for name, value in before.items())
    assert all(same(state[f"parameter/{name}"], before[name]) for name in program.parameter_names)
    assert not all(same(program.state()[f"parameter/{name}"], before[name]) for name in program.parameter_names)


def test_a_state_of_other_shapes_is_refused_and_foreign_keys_are_passed_over() -> None:
    program = programs("gpt", [], optimizer=OptimizerSpec(name="adamw"))[0]
    program.load_state({"parameter/elsewhere": torch.ones(1), "optimizer/step/elsewhere": torch.ones(())})
    with pytest.raises(BlobError, match=r"norm\.weight"):
        program.load_state({"parameter/norm.weight": torch.ones(3)})
    with pytest.raises(BlobError, match=r"exp_avg of norm\.weight"):
        program.load_state({"optimizer/exp_avg/norm.weight": torch.ones(3)})


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_arrivals_may_be_read_only_memory() -> None:
    made = captured("unet")
    first, second = programs("unet", [len(made.dag.body) // 2])
    batch = CASES["unet"].batch_of(1, 0)
    sent = first.forward(1, 0, {}, batch).outputs
    arrived = {edge: read_only(value) for edge, value in sent.items()}
    copies = {edge: value.clone() for edge, value in arrived.items()}
    second.forward(1, 0, arrived, batch)
    second.backward(1, 0, {})
    assert all(same(arrived[edge], copy) for edge, copy in copies.items())


def test_null_gradients_pass_through() -> None:
    made = captured("gpt")
    first, second, _ = programs("gpt", random_cuts(made.dag, 3, 3))
    batch = CASES["gpt"].batch_of(1, 0)
    arrivals = first.forward(1, 0, {}, batch).outputs
    second.forward(1, 0, arrivals, batch)
    nothing = second.backward(1, 0, {edge.index: None for edge in second.fragment.outputs if edge.gradient})
    wanted = {edge.index for edge in second.fragment.inputs if edge.gradient}
    assert nothing == dict.fromkeys(wanted)
    assert second.norms().tolist() == [-1.0] * len(second.parameter_names)
    before = second.state()
    second.update(1, None)
    assert all(same(value, before[key]) for key, value in second.state().items())


@pytest.mark.parametrize("name", ["gpt", "resnet", "vit"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_weights_come_later_with_the_same_bits(name: str, recompute: bool) -> None:
    made = captured(name)
    first, second = programs(name, [len(made.dag.body) // 2], recompute=recompute)
    whole = programs(name, [])[0]
    # The same as if nothing could wait: what the whole model gets, which sends nothing.
    assert whole.fragment.postponed == () == first.fragment.postponed
    parameters = {op.id: op.target for op in made.dag.ops if op.kind == "parameter"}
    waiting = {parameters[op] for _, ops in second.fragment.postponed for op in ops}
    assert waiting
    assert waiting < set(second.parameter_names)
    sent: dict[int, dict[int, Tensor | None]] = {}
    for index in range(2):
        batch = CASES[name].batch_of(1, index)
        whole.forward(1, index, {}, batch)
        second.forward(1, index, first.forward(1, index, {}, batch).outputs, batch, postpone=True)
    for index in range(2):
        whole.backward(1, index, {})
        sent[index] = second.backward(1, index, {})
    here = dict(zip(second.parameter_names, second._parameters.values(), strict=True))
    assert all((here[key].grad is None) == (key in waiting) for key in here)
    copies = {key: value if value is None else value.clone() for key, value in sent[0].items()}
    for index in range(2):
        slices = 1
        while second.weights(1, index):
            slices += 1
        assert slices == len(second.fragment.postponed)
        first.backward(1, index, sent[index])
    assert all(same(copies[key], value) for key, value in sent[0].items()), "what was sent has changed"
    expected = {key: value.grad for key, value in zip(whole.parameter_names, whole._parameters.values(), strict=True)}
    for program in (first, second):
        for key, value in zip(program.parameter_names, program._parameters.values(), strict=True):
            assert same(value.grad, expected[key]), key


@pytest.mark.parametrize("aside", [{0}, {1}, {0, 2}])
def test_a_whole_micro_batch_adds_to_what_those_before_it_owe(aside: set[int]) -> None:
    """In one step of a replay some micro-batches are computed whole, and others, `aside`, leave gradients for later."""
    name, count = "gpt", 4
    (first, expected), (_, mixed) = (programs(name, [len(captured(name).dag.body) // 2]) for _ in range(2))
    batches = [CASES[name].batch_of(1, index) for index in range(count)]
    arrivals = [first.forward(1, index, {}, batch).outputs for index, batch in enumerate(batches)]
    for index, batch in enumerate(batches):
        expected.forward(1, index, arrivals[index], batch)
        expected.backward(1, index, {})
    for index in range(count):
        if index in aside:
            mixed.forward(1, index, arrivals[index], batches[index], postpone=True)
            mixed.backward(1, index, {})
        else:
            mixed.add_up(mixed.whole(1, index, arrivals[index], batches[index], {}))
    for index in range(count):
        while mixed.weights(1, index):
            pass
    for key, right, found in zip(
        expected.parameter_names, expected._parameters.values(), mixed._parameters.values(), strict=True
    ):
        assert same(found.grad, right.grad), key


class Product(nn.Module):
    """`x @ w`, with a bias inside (`addmm`) or without (`mm`)."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.bias = nn.Parameter(torch.randn(5)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(6, 5), (3, 7, 6)),
        (lambda: nn.Linear(6, 5), (1, 6)),
        (lambda: Product(True), (4, 6)),
        (lambda: Product(False), (4, 6)),
        (lambda: nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 9)),
        (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 9, 9)),
        (lambda: nn.Conv3d(4, 6, 3, dilation=2), (2, 4, 7, 7, 7)),
        (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
        (lambda: nn.ConvTranspose3d(4, 6, 3), (2, 4, 5, 5, 5)),
    ],
)
def test_every_op_that_waits_computes_both_halves_with_the_bits_of_the_whole(
    layer: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(shape[-1]), layer())
    x = torch.randn(shape)
    y = torch.randn(model(x).shape)
    made = capture(model, {"inputs": x, "targets": y}, "mse")
    common: dict[str, Any] = {"seed": 0, "micro_batches": 1, "optimizer": OptimizerSpec(name="sgd", lr=0.1)}
    partition = cut(made.dag, [cut_points(made.dag)[0].position])
    first, second = (
        FragmentProgram(made.dag, fragment, **common, lr_schedule=LrScheduleSpec(), steps=1)
        for fragment in partition.fragments
    )
    assert second.fragment.postponed
    for program in (first, second):
        program.load(made.tensors)
    batch = {"inputs": x, "targets": y}
    second.forward(1, 0, first.forward(1, 0, {}, batch).outputs, batch, postpone=True)
    first.backward(1, 0, second.backward(1, 0, {}))
    while second.weights(1, 0):
        pass
    torch.nn.functional.mse_loss(model(x), y).backward()
    found = {key: value.grad for each in (first, second) for key, value in each._named(each._parameters).items()}
    for key, value in model.named_parameters():
        assert same(found[key], value.grad), key


def test_what_nobody_asked_for_is_in_the_norms_and_the_update() -> None:
    made = captured("gpt")
    outcomes = []
    for asked in (True, False):
        first, second = programs("gpt", [len(made.dag.body) // 2])
        batch = CASES["gpt"].batch_of(1, 0)
        second.forward(1, 0, first.forward(1, 0, {}, batch).outputs, batch, postpone=True)
        second.backward(1, 0, {})
        if asked:
            assert second.weights(1, 0), "one of several"
        norms = second.norms()
        second.update(1, None)
        outcomes.append((norms, second.state()))
    (norms, state), (others, other) = outcomes
    assert same(norms, others)
    assert all(same(value, other[key]) for key, value in state.items())


def test_norms_that_do_not_fit_the_model_are_refused() -> None:
    program = programs("gpt", [], clip_grad_norm=1.0)[0]
    with pytest.raises(FrameError, match="the model has"):
        program.update(1, {0: torch.zeros(3)})


def test_contributions_add_from_left_to_right_and_stay_as_they_are() -> None:
    big, small = torch.tensor([1e8]), torch.tensor([1.0])
    assert add_in_order([]) is None
    assert add_in_order([small]) is small
    total = add_in_order([big, small, -big])
    assert total is not None
    assert total.item() == ((big + small) - big).item()
    assert big.item() == 1e8


def test_a_gradient_that_is_a_message_is_copied() -> None:
    message = torch.ones(4)
    parameter = torch.zeros(2, 2, requires_grad=True)
    other = torch.zeros(4, requires_grad=True)
    parameter.grad = message.view(2, 2)
    other.grad = kept = torch.ones(4)
    own_gradients([parameter, other], [message])
    parameter.grad.add_(1.0)
    assert message.tolist() == [1.0] * 4
    assert other.grad is kept


def test_recomputing_keeps_no_activations() -> None:
    alive: set[int] = set()

    def held(recompute: bool) -> int:
        program = programs("gpt", [], recompute=recompute)[0]
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Witness(tensor.detach(), alive), lambda witness: witness.tensor
        ):
            program.forward(1, 0, {}, CASES["gpt"].batch_of(1, 0))
        return len(alive)

    assert held(False) > 50
    alive.clear()
    assert held(True) == 0


class _Witness:
    """A saved tensor that tells when autograd lets go of it."""

    def __init__(self, tensor: Tensor, alive: set[int]) -> None:
        self.tensor, self.alive = tensor, alive
        alive.add(id(self))

    def __del__(self) -> None:
        self.alive.discard(id(self))


def test_tied_weights_are_lent_once_and_their_gradient_returns_per_micro_batch() -> None:
    made = captured("gpt-tied")
    pipeline = Pipeline(made.dag, made.tensors, [len(made.dag.body) // 2], Settings(steps=2, micro_batches=3))
    edges = [edge for edge in pipeline.partition.edges if edge.kind == "parameter"]
    assert len(edges) == 1
    assert edges[0].gradient
    pipeline.run(CASES["gpt-tied"].batch_of)
    keys = [(key[0].name, *key[2:]) for key in pipeline.values if key[1] == edges[0].index and key[0].name != "NORMS"]
    assert [key for key in keys if key[0] == "ACTIVATION"] == [("ACTIVATION", 1, 0), ("ACTIVATION", 2, 0)]
    assert sorted(key for key in keys if key[0] == "GRADIENT") == [
        ("GRADIENT", step, index) for step in (1, 2) for index in range(3)
    ]


def test_ordering_and_board_do_not_load_torch() -> None:
    code = "import sys, executor, executor.board, executor.ordering; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
