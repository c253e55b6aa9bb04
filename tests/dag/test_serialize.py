"""Bytes from outside either are a well-formed, allowed OP-DAG, or end in one DagError; nothing runs, little memory goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dag.graph import Arg, Named, Op, OpDag, OpKind, Parameter, Ref, Rewired, TensorMeta
from dag.serialize import MAGIC, digest, dumps, loads
from dag.validate import MAX_ELEMENTS, MAX_OP_ARGUMENTS, MAX_STRING, validate
from fusion.errors import DagError

SCALAR = TensorMeta((), "float32")
VECTOR = TensorMeta((4,), "float32")


def op(id: int, kind: OpKind, target: str, *args: Arg, meta: TensorMeta = VECTOR, **fields: Any) -> Op:
    fields.setdefault("requires_grad", kind in ("parameter", "call", "loss"))
    return Op(id, f"op{id}", kind, target, args, outputs=fields.pop("outputs", (meta,)), **fields)


def small() -> OpDag:
    return OpDag(
        ops=(
            op(0, "parameter", "weight"),
            op(1, "placeholder", "inputs"),
            op(2, "buffer", "mean"),
            op(3, "call", "aten.mul.Tensor", Ref(0), Ref(1)),
            op(4, "call", "aten.chunk.default", Ref(3), 2, outputs=(TensorMeta((2,), "float32"),) * 2, aliases=(3,)),
            op(5, "call", "py.getitem", Ref(4), 0, meta=TensorMeta((2,), "float32"), aliases=(4,)),
            op(
                6,
                "call",
                "aten.add_.Tensor",
                Ref(2),
                1.5,
                mutates=(2,),
                requires_grad=False,
                kwargs=(("alpha", 2),),
            ),
            op(
                7,
                "call",
                "aten.sum.dim_IntList",
                Ref(5),
                (0,),
                False,
                meta=SCALAR,
                kwargs=(("dtype", Named("dtype", "float32")),),
            ),
            op(8, "loss", "loss", Ref(7), meta=SCALAR, aliases=(7,)),
        ),
        parameters=(Parameter(0, "weight", ("tied",), 3),),
        persistent_buffers=("mean",),
        name="small",
        autocast="bfloat16",
        notes=("a note",),
        buffer_aliases=(("mean", ("other.mean",)),),
    )


def of_two_modes() -> OpDag:
    """As `small`; training alone adds to the mean, and evaluation sums what it has doubled."""
    ops = list(small().ops)
    ops[6] = replace(ops[6], only_in="training")
    doubled = op(7, "call", "aten.mul.Tensor", Ref(5), 2, meta=ops[5].meta, requires_grad=False, only_in="evaluation")
    ops[7:] = [
        doubled,
        replace(ops[7], id=8, name="op8"),
        replace(ops[8], id=9, name="op9", args=(Ref(8),), aliases=(8,)),
    ]
    return replace(small(), ops=tuple(ops), rewired=(Rewired(8, (Ref(7), *ops[8].args[1:]), ops[8].kwargs),))


def changed(position: int, **fields: Any) -> OpDag:
    dag = small()
    ops = list(dag.ops)
    ops[position] = replace(ops[position], **fields)
    return replace(dag, ops=tuple(ops))


def changed_modes(position: int | None = None, rewired: tuple[Rewired, ...] | None = None, **fields: Any) -> OpDag:
    dag = of_two_modes()
    ops = list(dag.ops)
    if position is not None:
        ops[position] = replace(ops[position], **fields)
    return replace(dag, ops=tuple(ops), rewired=dag.rewired if rewired is None else rewired)


def sealed(body: Any, version: object = 1, magic: object = MAGIC) -> bytes:
    """An envelope with a right hash around any body."""
    packed = body if isinstance(body, bytes) else msgpack.packb(body)
    return msgpack.packb([magic, version, hashlib.sha256(packed).digest(), packed])  # type: ignore[no-any-return]


def body_of(dag: OpDag) -> Any:
    return msgpack.unpackb(msgpack.unpackb(dumps(dag))[3])


@pytest.mark.parametrize("make", [small, of_two_modes])
def test_a_dag_survives_the_trip(make: Callable[[], OpDag]) -> None:
    dag = make()
    data = dumps(dag)
    assert loads(data) == dag
    assert dumps(loads(data)) == data
    assert digest(data) == hashlib.sha256(data).hexdigest()


def nested(depth: int) -> Arg:
    arg: Arg = 1
    for _ in range(depth):
        arg = (arg,)
    return arg


HOSTILE: dict[str, tuple[Callable[[], OpDag], str]] = {
    "unknown operator": (lambda: changed(3, target="aten.from_file.default"), "allow-list"),
    "python": (lambda: changed(3, target="os.system"), "allow-list"),
    "forward reference": (lambda: changed(3, args=(Ref(0), Ref(7))), "does not come before"),
    "self reference": (lambda: changed(3, args=(Ref(3), Ref(1))), "does not come before"),
    "negative reference": (lambda: changed(3, args=(Ref(-1), Ref(1))), "does not come before"),
    "wrong id": (lambda: changed(3, id=4), "its id is 4"),
    "duplicate name": (lambda: changed(3, name="op1"), "taken"),
    "two readers of one tensor": (lambda: changed(2, target="weight"), "read by another op"),
    "deep nesting": (lambda: changed(7, args=(Ref(5), nested(9))), "nest deeper"),
    "too many arguments": (lambda: changed(7, args=(Ref(5), (0,) * (MAX_OP_ARGUMENTS + 1))), "arguments"),
    "long string": (lambda: changed(3, module="x" * (MAX_STRING + 1)), "characters"),
    "control characters": (lambda: changed(3, module="\x1b[2J"), "unprintable"),
    "absurd shape": (lambda: changed(3, outputs=(TensorMeta((MAX_ELEMENTS + 1,), "float32"),)), "elements"),
    "absurd product": (lambda: changed(3, outputs=(TensorMeta((2**21, 2**21), "float32"),)), "elements"),
    "absurd size beside a zero": (lambda: changed(3, outputs=(TensorMeta((0, 2**62), "float32"),)), "elements"),
    "rank": (lambda: changed(3, outputs=(TensorMeta((1,) * 99, "float32"),)), "rank"),
    "dtype": (lambda: changed(3, outputs=(TensorMeta((4,), "complex128"),)), "dtype"),
    "complex data": (lambda: changed(1, outputs=(TensorMeta((4,), "complex64"),)), "data of dtype complex64"),
    "named dtype": (lambda: changed(7, kwargs=(("dtype", Named("dtype", "object")),)), "dtype"),
    "named device": (lambda: changed(7, kwargs=(("device", Named("device", "cuda:0")),)), "device"),
    "named layout": (lambda: changed(7, kwargs=(("layout", Named("layout", "sparse_coo")),)), "layout"),
    "huge number": (lambda: changed(6, args=(Ref(2), 2**70)), "64 bits"),
    "keyword twice": (lambda: changed(6, kwargs=(("alpha", 1), ("alpha", 2))), "keywords"),
    "keyword no identifier": (lambda: changed(6, kwargs=(("a b", 1),)), "keywords"),
    "negative cost": (lambda: changed(3, flops=-1), "cost"),
    "writes a parameter": (lambda: changed(6, mutates=(0,)), "writes a parameter"),
    "writes its data": (lambda: changed(6, mutates=(1,)), "writes its input data"),
    "writes what comes later": (lambda: changed(3, mutates=(6,)), "does not come before"),
    "reads a list as a tensor": (lambda: changed(5, target="aten.relu.default", args=(Ref(4),)), "multi-output"),
    "item out of range": (lambda: changed(5, args=(Ref(4), 2)), "outputs"),
    "item of a tensor": (lambda: changed(5, args=(Ref(3), 0)), "not that of the output"),
    "item with another shape": (lambda: changed(5, outputs=(VECTOR,)), "shape"),
    "leaf with arguments": (lambda: changed(1, args=(1,)), "no arguments"),
    "leaf without a name": (lambda: changed(1, target=""), "without a name"),
    "integer parameter": (lambda: changed(0, outputs=(TensorMeta((4,), "int64"),)), "dtype int64"),
    "leaf without output": (lambda: changed(1, outputs=()), "no output"),
    "loss in the middle": (lambda: changed(7, kind="loss"), "not the last"),
    "no loss": (lambda: replace(small(), ops=small().ops[:-1]), "no loss"),
    "no ops": (lambda: replace(small(), ops=()), "no ops"),
    "loss is no scalar": (lambda: changed(8, args=(Ref(5),), outputs=(TensorMeta((2,), "float32"),)), "scalar"),
    "loss without gradient": (lambda: changed(8, requires_grad=False), "any parameter"),
    "parameter not listed": (lambda: replace(small(), parameters=()), "not listed"),
    "parameter listed twice": (lambda: replace(small(), parameters=small().parameters * 2), "listed twice"),
    "parameter of another name": (lambda: replace(small(), parameters=(Parameter(0, "other"),)), "differ"),
    "parameter that is no parameter": (lambda: replace(small(), parameters=(Parameter(1, "inputs"),)), "match"),
    "autocast": (lambda: replace(small(), autocast="int4"), "autocast"),
    "leaf of one mode": (lambda: changed(2, only_in="training"), "in training and in evaluation"),
    "loss of one mode": (lambda: changed(8, only_in="evaluation"), "the loss is in training and in evaluation"),
    "gradient in evaluation": (lambda: changed_modes(7, requires_grad=True), "has no gradients"),
    "cost in evaluation": (lambda: changed_modes(7, flops=1), "no costs"),
    "write in evaluation": (lambda: changed_modes(7, mutates=(2,)), "writes nothing of training's"),
    "training reads evaluation": (lambda: changed_modes(8, args=(Ref(7), (0,), False)), "in evaluation alone"),
    "evaluation reads training": (lambda: changed_modes(7, args=(Ref(6), 2)), "in training alone"),
    "unrewired, and training's input is gone": (lambda: changed_modes(5, only_in="training"), "in training alone"),
    "rewired to what comes later": (lambda: changed_modes(rewired=(Rewired(8, (Ref(9),)),)), "does not come before"),
    "rewired beyond the end": (lambda: changed_modes(rewired=(Rewired(10, (Ref(7),)),)), "not there"),
    "rewired twice": (lambda: changed_modes(rewired=(Rewired(8, (Ref(7),)),) * 2), "out of order"),
    "rewired data": (lambda: changed_modes(rewired=(Rewired(1),)), "can't read other values"),
    "rewired loss of two values": (lambda: changed_modes(rewired=(Rewired(9, (Ref(8), Ref(8))),)), "passes one value"),
    "rewired loss that is no scalar": (lambda: changed_modes(rewired=(Rewired(9, (Ref(7),)),)), "scalar"),
    "parameter of evaluation": (
        lambda: replace(
            of_two_modes(),
            ops=(
                *of_two_modes().ops[:3],
                replace(of_two_modes().ops[3], args=(Ref(1), Ref(1))),
                *of_two_modes().ops[4:7],
                replace(of_two_modes().ops[7], args=(Ref(5), Ref(0))),
                *of_two_modes().ops[8:],
            ),
        ),
        "read in evaluation alone",
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_dags_are_refused(attack: str) -> None:
    make, says = HOSTILE[attack]
    with pytest.raises(DagError, match=says):
        validate(make())


def test_deep_nesting_in_the_bytes() -> None:
    body = body_of(small())
    arg: Any = 1
    for _ in range(400):
        arg = [2, arg]
    body[5][7][3][1] = arg
    with pytest.raises(DagError, match="nest"):
        loads(sealed(body))
    deep = b"\x91" * 100_000 + b"\x01"
    with pytest.raises(DagError):
        loads(sealed(deep))
    with pytest.raises(DagError):
        loads(deep)


def test_wrong_hash_version_and_kind_of_file() -> None:
    data = bytearray(dumps(small()))
    data[-1] ^= 1
    with pytest.raises(DagError, match="hash"):
        loads(bytes(data))
    body = body_of(small())
    with pytest.raises(DagError, match="schema version 2"):
        loads(sealed(body, version=2))
    with pytest.raises(DagError, match="not an OP-DAG"):
        loads(sealed(body, magic="other"))
    with pytest.raises(DagError, match="not an OP-DAG"):
        loads(msgpack.packb({}) if False else msgpack.packb([]))


def test_truncated_and_overlong_bytes() -> None:
    data = dumps(small())
    for end in range(0, len(data), 7):
        with pytest.raises(DagError):
            loads(data[:end])
    with pytest.raises(DagError):
        loads(data + b"\x00")


def test_claimed_sizes_take_no_memory() -> None:
    """A header that claims 4 GiB of list, string or bytes is refused by its length alone."""
    for claim in (b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"):
        with pytest.raises(DagError):
            loads(claim)
        with pytest.raises(DagError):
            loads(sealed(claim))


@pytest.mark.parametrize("flags", [-1, 24, 32, "7", None])
def test_unknown_flags(flags: object) -> None:
    body = body_of(of_two_modes())
    body[5][3][7] = flags
    with pytest.raises(DagError, match="flags"):
        loads(sealed(body))


@pytest.mark.parametrize("rewired", [None, [[8, []]], [["8", [], []]], [[8, [[0, 7, 1]], []]]])
def test_rewired_ops_that_are_something_else(rewired: object) -> None:
    body = body_of(of_two_modes())
    body[7] = rewired
    with pytest.raises(DagError):
        loads(sealed(body))
    with pytest.raises(DagError):
        loads(sealed([*body, []]))


@pytest.mark.parametrize("kind", [-1, 6, "call", None, True])
def test_unknown_kinds(kind: object) -> None:
    body = body_of(small())
    body[5][3][1] = kind
    with pytest.raises(DagError):
        loads(sealed(body))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_are_refused_or_read(data: st.DataObject) -> None:
    """Any change of the body, under a right hash, gives a valid DAG or a DagError, never another exception."""
    original = msgpack.unpackb(dumps(data.draw(st.sampled_from([small, of_two_modes]))()))[3]
    body = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        dag = loads(sealed(bytes(body)))
    except DagError:
        return
    validate(dag)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4),
    lambda children: st.lists(children, max_size=6) | st.dictionaries(st.text(max_size=3), children, max_size=2),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_replaced_parts_are_refused_or_read(data: st.DataObject) -> None:
    """The same with any part of the structure replaced by any value."""
    body = body_of(data.draw(st.sampled_from([small, of_two_modes]))())
    place: Any = body
    while True:
        index = data.draw(st.integers(0, len(place) - 1))
        if isinstance(place[index], list) and place[index] and data.draw(st.booleans()):
            place = place[index]
            continue
        place[index] = data.draw(VALUES)
        break
    try:
        validate(loads(sealed(body)))
    except DagError:
        return


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(DagError):
        loads(data)
