"""What a coordinator does with an OP-DAG takes time in proportion to it, also where one op reads much or much reads one op."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from dag.cut import cut_points
from dag.graph import Arg, Op, OpDag, Parameter, Ref, Rewired, TensorMeta
from dag.validate import validate

COUNT = 20_000
SCALAR, VECTOR = TensorMeta((), "float32"), TensorMeta((1,), "float32")


class Growing:
    def __init__(self) -> None:
        self.ops = [Op(0, "weight", "parameter", "weight", outputs=(VECTOR,), requires_grad=True)]

    def call(self, target: str, *args: Arg, meta: TensorMeta = VECTOR, evaluation: bool = False) -> int:
        op = Op(len(self.ops), f"op{len(self.ops)}", "call", target, args, outputs=(meta,), requires_grad=True)
        if target.endswith("_.default"):
            op = replace(op, mutates=op.inputs(), aliases=op.inputs())
        self.ops.append(replace(op, only_in="evaluation", requires_grad=False) if evaluation else op)
        return op.id

    def finish(self, *rewired: Rewired) -> OpDag:
        self.call("aten.sum.default", Ref(len(self.ops) - 1), meta=SCALAR)
        end = len(self.ops)
        self.ops.append(Op(end, "loss", "loss", "loss", (Ref(end - 1),), outputs=(SCALAR,), requires_grad=True))
        return OpDag(tuple(self.ops), (Parameter(0, "weight"),), rewired=rewired)


def reads_much_else() -> OpDag:
    dag = Growing()
    values = [Ref(dag.call("aten.relu.default", Ref(0))) for _ in range(6 * COUNT)]
    both = dag.call("aten.cat.default", tuple(values[: 3 * COUNT]), meta=TensorMeta((3 * COUNT,), "float32"))
    return dag.finish(Rewired(both, (tuple(values[3 * COUNT :]),)))


def is_read_by_many() -> OpDag:
    dag = Growing()
    value = Ref(dag.call("aten.relu.default", Ref(0)))
    for evaluation in (True, False):
        for _ in range(COUNT):
            dag.call("aten.relu.default", value, evaluation=evaluation)
    return dag.finish()


def writes_many() -> OpDag:
    dag = Growing()
    for _ in range(COUNT):
        dag.call("aten.relu_.default", Ref(dag.call("aten.relu.default", Ref(0))))
    return dag.finish()


@pytest.mark.parametrize("make", [reads_much_else, is_read_by_many, writes_many])
def test_a_large_graph(make: Callable[[], OpDag]) -> None:
    dag = make()
    begun = time.process_time()
    validate(dag)
    assert cut_points(dag)
    assert time.process_time() - begun < 10
