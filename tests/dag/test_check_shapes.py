"""A worker finds out that a DAG lies about shapes before it takes memory for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from dag_cases import captured

from dag.cut import cut, cut_points
from dag.graph import Arg, Op, OpDag, Ref, Rewired, TensorMeta
from dag.propagate import check_shapes
from fusion.errors import DagError


def one(target: str, *args: Arg, outputs: tuple[TensorMeta, ...], inputs: tuple[TensorMeta, ...] = ()) -> OpDag:
    leaves = [Op(i, f"input{i}", "placeholder", f"input{i}", outputs=(meta,)) for i, meta in enumerate(inputs)]
    call = Op(len(leaves), "call", "call", target, args, outputs=outputs)
    return OpDag((*leaves, call), ())


def refused(dag: OpDag) -> str:
    with pytest.raises(DagError) as caught:
        check_shapes(dag, [dag.ops[-1].id])
    return str(caught.value)


def test_every_fragment_of_a_capture_passes() -> None:
    dag = captured("unet")[1].dag
    for fragment in cut(dag, [point.position for point in cut_points(dag)][::15]).fragments:
        check_shapes(dag, fragment.ops)


@pytest.mark.parametrize("field", [{"shape": (3,)}, {"dtype": "float64"}])
def test_a_lie_about_shape_or_dtype(field: dict[str, Any]) -> None:
    dag = captured("gpt")[1].dag
    at = next(op.id for op in dag.ops if op.target == "aten.gelu.default")
    ops = list(dag.ops)
    ops[at] = replace(ops[at], outputs=(replace(ops[at].meta, **field),))
    with pytest.raises(DagError, match=f"{ops[at].name} .*declares"):
        check_shapes(replace(dag, ops=tuple(ops)), [at])


def test_a_lie_about_what_evaluation_reads() -> None:
    row, column = TensorMeta((1, 4), "float32"), TensorMeta((4, 1), "float32")
    dag = one("aten.relu.default", Ref(0), outputs=(row,), inputs=(row, column))
    with pytest.raises(DagError, match=r"declares float32\[1, 4\] but gives float32\[4, 1\]"):
        check_shapes(replace(dag, rewired=(Rewired(2, (Ref(1),)),)), [2])
    check_shapes(dag, [2])


def test_an_allocation_larger_than_declared_takes_no_memory() -> None:
    dag = one("aten.zeros.default", (2**38,), outputs=(TensorMeta((4,), "float32"),))
    assert "declares" in refused(dag)


def test_more_pieces_than_declared_are_not_even_listed() -> None:
    wide = TensorMeta((2**38,), "float32")
    piece = TensorMeta((1,), "float32")
    assert "274877906944 tensors" in refused(one("aten.split.Tensor", Ref(0), 1, outputs=(piece,) * 2, inputs=(wide,)))
    assert "274877906944 tensors" in refused(one("aten.unbind.int", Ref(0), outputs=(piece,) * 2, inputs=(wide,)))
    assert "tensors" in refused(one("aten.chunk.default", Ref(0), 2**37, outputs=(piece,) * 2, inputs=(wide,)))
    assert "tensors" in refused(one("aten.tensor_split.sections", Ref(0), 2**37, outputs=(piece,) * 2, inputs=(wide,)))


@pytest.mark.parametrize(
    ("target", "args"),
    [
        ("aten.mm.default", (Ref(0),)),
        ("aten.mm.default", (Ref(0), Ref(0))),
        ("aten.mm.default", ("text", Ref(0))),
        ("aten.zeros.default", ((-1,),)),
        ("aten.index.Tensor", (Ref(0), (Ref(1),))),
        ("aten.repeat_interleave.Tensor", (Ref(2),)),
        ("aten.one_hot.default", (Ref(2),)),
    ],
)
def test_calls_that_torch_refuses(target: str, args: tuple[Arg, ...]) -> None:
    inputs = (TensorMeta((2, 3), "float32"), TensorMeta((2, 3), "bool"), TensorMeta((2,), "int64"))
    assert "\n" not in refused(one(target, *args, outputs=(TensorMeta((2, 3), "float32"),), inputs=inputs))


def test_an_unlisted_operator() -> None:
    assert "allow-list" in refused(one("aten.from_file.default", "/etc/passwd", outputs=(TensorMeta((2,), "uint8"),)))
