"""The OP-DAG: one training computation (model and loss, one micro-batch) as plain data.

Importing this module never imports torch; `dag.capture` makes an `OpDag`, `dag.serialize` reads and
writes one, `dag.cut` cuts one into fragments, and `dag.operators` knows how to run its calls.
Node attributes follow FusionLLM section 3 (name, args, kwargs, users); placement is kept out of the graph, in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Literal

SCHEMA_VERSION = 1

OpKind = Literal["placeholder", "parameter", "buffer", "constant", "call", "loss"]

DTYPE_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
}
COMPLEX = frozenset({"complex64"})
"""Never crosses a cut: links carry real numbers."""
FLOATING = frozenset({"float64", "float32", "bfloat16", "float16"})


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is the value of another op."""

    op: int


@dataclass(frozen=True, slots=True)
class Named:
    """An argument that torch knows by name: a dtype, layout or memory format, or the device the fragment runs on."""

    kind: Literal["dtype", "layout", "memory_format", "device"]
    name: str


Arg = None | bool | int | float | str | Ref | Named | tuple["Arg", ...]


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """Shape and dtype of one tensor; `dtype` is torch's name without the `torch.` prefix."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def is_floating(self) -> bool:
        return self.dtype in FLOATING

    @property
    def is_complex(self) -> bool:
        return self.dtype in COMPLEX


@dataclass(frozen=True, slots=True)
class Op:
    """One node of the OP-DAG.

    `id` is its position in `OpDag.ops`, which is a topological order. `target` is the data key of a placeholder,
    the fully qualified name of a parameter, buffer or constant, the ATen overload of a call (`aten.linear.default`,
    or `py.getitem` to take one output of a multi-output call), and `loss` for the one loss op, which passes its
    argument through.
    """

    id: int
    name: str
    kind: OpKind
    target: str
    args: tuple[Arg, ...] = ()
    kwargs: tuple[tuple[str, Arg], ...] = ()
    outputs: tuple[TensorMeta, ...] = ()
    module: str = ""
    no_grad: bool = False
    """Runs without recording gradients (it stood under `torch.no_grad()`)."""
    random: bool = False
    """Draws random numbers; seeded from (job seed, step, micro-batch, `OpDag.numbers`) before each run."""
    requires_grad: bool = False
    """At least one floating or complex output takes part in differentiation."""
    mutates: tuple[int, ...] = ()
    """Ops whose storage this call writes in place (buffers, or intermediates that could not be made functional)."""
    aliases: tuple[int, ...] = ()
    """Ops whose storage this op's output may share (views)."""
    flops: int = 0
    """Forward floating-point operations for one micro-batch."""
    backward_flops: int = 0
    saved_bytes: int = 0
    """Bytes that autograd keeps from this op until its backward, not counting parameters or values already counted."""
    only_in: Literal["", "training", "evaluation"] = ""
    """Where a branch on `self.training` has it alone; in both when empty."""

    @property
    def meta(self) -> TensorMeta:
        """The single output's meta. Multi-output calls are only read through `py.getitem`."""
        return self.outputs[0]

    @property
    def output_bytes(self) -> int:
        return sum(meta.nbytes for meta in self.outputs)

    def inputs(self) -> tuple[int, ...]:
        """Ids of the ops whose values this op reads, in argument order, without repeats."""
        return _inputs(self.args, self.kwargs)


def refs_of(arg: Arg) -> Iterator[int]:
    """Every op id that an argument mentions, in order."""
    if isinstance(arg, Ref):
        yield arg.op
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs_of(item)


def _inputs(args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...]) -> tuple[int, ...]:
    seen: dict[int, None] = {}
    for arg in (*args, *(value for _, value in kwargs)):
        for ref in refs_of(arg):
            seen[ref] = None
    return tuple(seen)


@dataclass(frozen=True, slots=True)
class Rewired:
    """An op that reads other values in evaluation than in training: past what training alone does, say."""

    op: int
    args: tuple[Arg, ...] = ()
    kwargs: tuple[tuple[str, Arg], ...] = ()

    def inputs(self) -> tuple[int, ...]:
        """As `Op.inputs`."""
        return _inputs(self.args, self.kwargs)


@dataclass(frozen=True, slots=True)
class Parameter:
    """What the optimiser and the checkpoint know of a parameter op."""

    op: int
    name: str
    """Its key in `model.state_dict()`."""
    aliases: tuple[str, ...] = ()
    """Further state-dict keys that are the same tensor (tied weights)."""
    order: int = 0
    """Position in `model.parameters()`; norms for gradient clipping combine in this order."""


@dataclass(frozen=True)
class OpDag:
    """A captured training computation.

    Invariants (checked by `dag.validate`): ids equal positions; arguments refer to earlier ops only; exactly one
    `loss` op, the last; every call target is on the allow-list; every argument is a plain value.
    """

    ops: tuple[Op, ...]
    parameters: tuple[Parameter, ...]
    persistent_buffers: tuple[str, ...] = ()
    """Buffers that belong to `model.state_dict()`."""
    name: str = "model"
    autocast: str | None = None
    """`bfloat16` when mixed precision was traced into the graph; its casts are ordinary ops."""
    notes: tuple[str, ...] = field(default=())
    """What capture wants a person to know (a Python branch that was baked in, say)."""
    buffer_aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Buffers that `model.state_dict()` holds under several names: the canonical name and the further ones."""
    rewired: tuple[Rewired, ...] = ()
    """What `self.training` decides in forward, ascending by op. Flags that operators take are not among it (`dag.evaluation`)."""

    @property
    def loss(self) -> Op:
        return self.ops[-1]

    @cached_property
    def users(self) -> tuple[tuple[int, ...], ...]:
        """For each op, the ids of the ops that read its value in training, ascending."""
        users: list[list[int]] = [[] for _ in self.ops]
        for op in self.ops:
            if op.only_in != "evaluation":
                for source in op.inputs():
                    users[source].append(op.id)
        return tuple(tuple(ids) for ids in users)

    @cached_property
    def training(self) -> tuple[Op, ...]:
        """The ops without those of evaluation alone, and without the inputs that these alone read."""
        read = {source for sources in self.evaluation_inputs.values() for source in sources}
        return tuple(
            op
            for op in self.ops
            if op.only_in != "evaluation" and (op.kind in ("call", "loss") or self.users[op.id] or op.id not in read)
        )

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """For each op, the number that its random numbers are seeded with: training's are those that it would have alone."""
        trained = {op.id: number for number, op in enumerate(self.training)}
        others = count(len(trained))
        return tuple(trained[op.id] if op.id in trained else next(others) for op in self.ops)

    @cached_property
    def rewired_ops(self) -> dict[int, Rewired]:
        """By op."""
        return {form.op: form for form in self.rewired}

    @cached_property
    def evaluation_inputs(self) -> dict[int, tuple[int, ...]]:
        """By op, what it reads in evaluation and not in training."""
        found = {op.id: op.inputs() for op in self.ops if op.only_in == "evaluation"}
        for form in self.rewired:
            known = frozenset(self.ops[form.op].inputs())
            found[form.op] = tuple(source for source in form.inputs() if source not in known)
        return found

    @cached_property
    def placeholders(self) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if op.kind == "placeholder")

    @cached_property
    def written(self) -> frozenset[int]:
        """Ops whose storage some call writes in place."""
        return frozenset(target for op in self.ops for target in op.mutates)

    @cached_property
    def constant(self) -> frozenset[int]:
        """Ops that depend on constants only: each fragment that needs one computes it again, it is never shipped.

        Constants are lifted tensors, buffers that nobody writes, and deterministic calls on constants whose storage
        nobody writes.
        """
        constant: set[int] = set()
        for op in self.ops:
            if op.id in self.written:
                continue
            if op.kind in ("buffer", "constant") or (
                op.kind == "call"
                and not op.random
                and not op.mutates
                and all(source in constant for source in op.inputs())
            ):
                constant.add(op.id)
        return frozenset(constant)

    @cached_property
    def body(self) -> tuple[int, ...]:
        """The calls that are cut into fragments, in order: everything that is not an input and not constant."""
        return tuple(op.id for op in self.ops if op.kind in ("call", "loss") and op.id not in self.constant)
