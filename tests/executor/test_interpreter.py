"""Ops run as they stand in the DAG, values go at their last use, random ops draw from their own seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dag.graph import Named, Op, Ref
from executor.interpreter import Interpreter
from executor.randomness import op_seed
from fusion.errors import DagError, DataError

CPU = torch.device("cpu")


def call(op: int, target: str, *args: Any, kwargs: tuple[tuple[str, Any], ...] = (), **flags: bool) -> Op:
    return Op(op, f"op{op}", "call", target, args=args, kwargs=kwargs, **flags)  # type: ignore[arg-type]


def run(ops: list[Op], given: dict[int, Tensor], step: int = 1, micro_batch: int = 0, **options: Any) -> list[Any]:
    interpreter = Interpreter(ops, given, [op.id for op in ops], device=CPU, **options)
    values = interpreter.fresh()
    for op, value in given.items():
        values[interpreter.slot[op]] = value
    interpreter.run(values, step, micro_batch)
    return [values[interpreter.slot[op.id]] for op in ops]


def test_plain_values_names_lists_and_keyword_arguments() -> None:
    a, b = torch.arange(4.0), torch.ones(4)
    ops = [
        call(2, "aten.cat.default", (Ref(0), Ref(1)), 0),
        call(3, "aten.view.default", Ref(2), (2, 4)),
        call(4, "aten.to.dtype", Ref(3), Named("dtype", "float64")),
        call(5, "aten.sum.dim_IntList", Ref(4), (1,), kwargs=(("keepdim", True),)),
        call(6, "aten.arange.default", 3, kwargs=(("device", Named("device", "")), ("pin_memory", False))),
        call(7, "aten.add.Tensor", Ref(0), kwargs=(("other", Ref(1)), ("alpha", 2))),
        call(8, "aten.split.Tensor", Ref(2), 4),
        call(9, "py.getitem", Ref(8), 1),
        Op(10, "loss", "loss", "loss", args=(Ref(5),)),
    ]
    cat, view, to, total, arange, added, pieces, second, loss = run(ops, {0: a, 1: b})
    assert torch.equal(cat, torch.tensor([0.0, 1, 2, 3, 1, 1, 1, 1]))
    assert view.shape == (2, 4)
    assert to.dtype == torch.float64
    assert total.tolist() == [[6.0], [4.0]]
    assert arange.tolist() == [0, 1, 2]
    assert torch.equal(added, a + 2 * b)
    assert len(pieces) == 2
    assert torch.equal(second, b)
    assert loss is total


@pytest.mark.parametrize(("evaluation", "part"), [(False, "micro-batch"), (True, "evaluation batch")])
def test_an_index_beyond_a_table_names_the_micro_batch_and_the_module(evaluation: bool, part: str) -> None:
    ops = [
        call(2, "aten.neg.default", Ref(0)),
        Op(3, "op3", "call", "aten.embedding.default", args=(Ref(2), Ref(1)), module="tokens"),
    ]
    given = {0: torch.ones(4, 2), 1: torch.tensor([3, 4])}
    with pytest.raises(DataError, match=f"^step 7, {part} 2: aten.embedding.default of tokens: index out of range"):
        run(ops, given, 7, 2, evaluation=evaluation)


def test_a_value_is_dropped_at_its_last_use() -> None:
    ops = [
        call(1, "aten.neg.default", Ref(0)),
        call(2, "aten.neg.default", Ref(1)),
        call(3, "aten.neg.default", Ref(2)),
    ]
    interpreter = Interpreter(ops, [0], [3], device=CPU)
    values = interpreter.fresh()
    values[interpreter.slot[0]] = torch.ones(2)
    interpreter.run(values, 1, 0)
    assert [values[interpreter.slot[op]] is None for op in range(4)] == [False, True, True, False]


def test_no_grad_ops_record_nothing() -> None:
    leaf = torch.ones(2, requires_grad=True)
    tracked, detached = run(
        [call(1, "aten.exp.default", Ref(0)), call(2, "aten.exp.default", Ref(0), no_grad=True)], {0: leaf}
    )
    assert tracked.requires_grad
    assert not detached.requires_grad


def test_random_ops_draw_from_their_own_seed() -> None:
    ops = [
        call(5, "aten.dropout.default", Ref(0), 0.5, True, random=True),
        call(6, "aten.dropout.default", Ref(0), 0.5, True, random=True),
    ]
    ones = {0: torch.ones(64)}
    first, second = run(ops, ones, step=3, micro_batch=1, job_seed=9)
    torch.manual_seed(op_seed(9, 3, 1, 5))
    assert torch.equal(first, torch.dropout(ones[0], 0.5, True))
    assert not torch.equal(first, second)
    alone = run(ops[1:], ones, step=3, micro_batch=1, job_seed=9)[0]
    assert torch.equal(alone, second), "what ran before makes no difference"
    assert not torch.equal(run(ops, ones, step=4, micro_batch=1, job_seed=9)[0], first)
    assert not torch.equal(run(ops, ones, step=3, micro_batch=1, job_seed=9, evaluation=True)[0], first)


def test_an_op_that_reads_what_is_not_there_is_refused() -> None:
    with pytest.raises(DagError, match=r"op2 \(aten.neg.default\) reads op 1"):
        Interpreter([call(2, "aten.neg.default", Ref(1))], [0], [2], device=CPU)


def test_an_operator_that_is_not_allowed_is_refused() -> None:
    with pytest.raises(DagError, match="allow-list"):
        Interpreter([call(1, "aten.from_file.default", "/etc/passwd")], [], [1], device=CPU)
