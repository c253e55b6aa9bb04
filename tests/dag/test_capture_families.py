"""The keystone of capture: a whole OP-DAG, also after a round trip through bytes, gives the bits of the eager model."""

from __future__ import annotations

import copy

import pytest
import torch
from dag_cases import CASES, assert_same_bits, captured, interpret

from dag.cut import cut, cut_points, differentiated
from dag.graph import OpDag
from dag.operators import run
from dag.propagate import check_shapes
from dag.serialize import dumps, loads

FAMILIES = pytest.mark.parametrize("family", CASES)


@FAMILIES
def test_interpreting_the_dag_gives_the_eager_bits(family: str) -> None:
    case, found = captured(family)
    assert_same_bits(found.dag, found.tensors, case)


@FAMILIES
def test_bytes_bring_back_the_same_dag(family: str) -> None:
    _, found = captured(family)
    data = dumps(found.dag)
    assert loads(data) == found.dag
    assert dumps(loads(data)) == data


@FAMILIES
def test_declared_shapes_are_what_the_operators_give(family: str) -> None:
    _, found = captured(family)
    check_shapes(found.dag, [op.id for op in found.dag.ops])


@FAMILIES
def test_tensors_are_the_state_dict_and_what_the_dag_reads(family: str) -> None:
    case, found = captured(family)
    state = case.model.state_dict()
    assert all(torch.equal(found.tensors[key], value) for key, value in state.items())
    for op in found.dag.ops:
        if op.kind in ("parameter", "buffer", "constant"):
            tensor = found.tensors[op.target]
            assert (tuple(tensor.shape), f"torch.{op.meta.dtype}") == (op.meta.shape, str(tensor.dtype))
        if op.kind == "constant":
            assert op.target.startswith("constant/")
    order = [name for name, _ in case.model.named_parameters()]
    assert all(order[parameter.order] == parameter.name for parameter in found.dag.parameters)


@FAMILIES
def test_there_are_many_legal_cuts_and_cheap_ones_between_blocks(family: str) -> None:
    _, found = captured(family)
    dag = found.dag
    points = cut_points(dag)
    assert len(points) >= 0.6 * (len(dag.body) - 1)
    cut(dag, [point.position for point in points])
    if "lstm" in family:
        return
    middle = [point for point in points if 0.25 < point.position / len(dag.body) < 0.75]
    hidden = max(dag.ops[op].output_bytes for op in dag.body)
    assert min(point.forward_bytes for point in middle) < 2.5 * hidden


@FAMILIES
def test_every_op_has_a_module_and_costs(family: str) -> None:
    case, found = captured(family)
    modules = {name for name, _ in case.model.named_modules()}
    assert {op.module for op in found.dag.ops} <= modules
    matrix = [op for op in found.dag.ops if op.target in ("aten.linear.default", "aten.conv2d.default")]
    for op in matrix:
        # Twice in backward: for the input and for the weight; the first layer has no gradient for its input.
        assert op.backward_flops in (op.flops, 2 * op.flops)
        assert op.flops > 0
    gradients = differentiated(found.dag)
    assert all(op.requires_grad for op in found.dag.ops if op.id in gradients)


@pytest.mark.parametrize("family", ["gpt", "resnet18", "hf llama"])
def test_saved_bytes_are_what_autograd_keeps(family: str) -> None:
    case, found = captured(family)
    model = copy.deepcopy(case.model)
    held = {parameter.untyped_storage()._cdata for parameter in (*model.parameters(), *model.buffers())}
    held |= {value.untyped_storage()._cdata for value in case.example.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.eager(model)
    real = sum(storage.nbytes() for storage in kept.values())
    assert sum(op.saved_bytes for op in found.dag.ops) == pytest.approx(real, rel=0.1)


def test_flops_count_attention_and_linear_layers() -> None:
    _, found = captured("gpt")
    batch, heads, length, size = 2, 4, 16, 8
    attention = [op for op in found.dag.ops if op.target == "aten.scaled_dot_product_attention.default"]
    assert [op.flops for op in attention] == [2 * 2 * batch * heads * length * length * size] * 2
    head = next(op for op in found.dag.ops if op.module == "head")
    assert head.flops == 2 * batch * length * 32 * 256


def test_a_tied_parameter_is_one_op_with_an_alias() -> None:
    _, found = captured("gpt tied")
    tied = [parameter for parameter in found.dag.parameters if parameter.aliases]
    assert [(parameter.name, parameter.aliases) for parameter in tied] == [("token_embedding.weight", ("head.weight",))]
    assert len(found.dag.users[tied[0].op]) == 2


def test_what_depends_on_constants_only_is_not_in_the_body() -> None:
    _, found = captured("hf llama")
    dag = found.dag
    recomputed = {dag.ops[op].target for op in dag.constant}
    assert {"aten.arange.start", "aten.arange.default"} & recomputed
    assert any(dag.ops[op].no_grad for op in dag.constant), "rotary tables are computed under no_grad"


def test_only_what_really_draws_is_random() -> None:
    assert not any(op.random for op in captured("gpt")[1].dag.ops)
    drawing = [op for op in captured("gpt dropout")[1].dag.ops if op.random]
    assert {op.target for op in drawing} == {
        "aten.dropout.default",
        "aten.scaled_dot_product_attention.default",
    }
    assert [op.target for op in captured("lstm dropout")[1].dag.ops if op.random] == ["aten.lstm.input"]
    assert not any(op.random for op in captured("lstm")[1].dag.ops)


def test_batch_norm_writes_its_running_statistics_and_nothing_else_is_written() -> None:
    _, found = captured("resnet18")
    dag = found.dag
    assert {dag.ops[op].kind for op in dag.written} <= {"buffer", "call"}
    norm = next(op for op in dag.ops if op.target == "aten.batch_norm.default")
    assert {dag.ops[op].target.rsplit(".", 1)[1] for op in norm.mutates} == {"running_mean", "running_var"}
    assert not any(op.target in ("aten.relu_.default",) for op in dag.ops)


@pytest.mark.parametrize("family", ["resnet18", "unet", "hf bert"])
def test_any_order_of_fragments_is_reproduced_by_running_them_in_turn(family: str) -> None:
    """Fragment by fragment, forward only: nothing is needed that a fragment does not say."""
    case, found = captured(family)
    dag = found.dag
    points = [point.position for point in cut_points(dag)]
    partition = cut(dag, points[:: max(1, len(points) // 4)])
    shipped: dict[int, torch.Tensor] = {}
    torch.manual_seed(3)
    for fragment in partition.fragments:
        values: dict[int, object] = {edge.value: shipped[edge.value] for edge in fragment.inputs}
        for op_id in (*fragment.parameters, *fragment.written_buffers, *fragment.constants, *fragment.placeholders):
            op = dag.ops[op_id]
            source = case.example if op.kind == "placeholder" else found.tensors
            values[op_id] = source[op.target].clone()
        for op_id in fragment.ops:
            values[op_id] = run(dag.ops[op_id], values, torch.device("cpu"))
        for edge in fragment.outputs:
            value = values[edge.value]
            assert isinstance(value, torch.Tensor)
            shipped[edge.value] = value.contiguous()
    torch.manual_seed(3)
    loss, _ = interpret(dag, found.tensors, case.example)
    assert torch.equal(values[dag.loss.id], loss)  # type: ignore[arg-type]


def test_the_same_model_gives_the_same_bytes() -> None:
    def once() -> OpDag:
        captured.cache_clear()
        return captured("resnet18")[1].dag

    assert dumps(once()) == dumps(once())
