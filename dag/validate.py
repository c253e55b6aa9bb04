"""Checks an OP-DAG before anything is built from it: whatever a hostile file could ask for ends in `DagError`.

These checks need no torch and take no memory worth naming. What only torch knows, whether an operator gives the
declared shapes, is checked by `dag.propagate.check_shapes` in the worker, before a fragment runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from dag.allowlist import ALLOWED, GETITEM
from dag.graph import DTYPE_BYTES, Arg, Named, Op, OpDag, Ref
from fusion.errors import DagError

MAX_BYTES = 256 * 2**20
"""Serialised size. Models of a thousand layers stay under 20 MiB."""
MAX_OPS = 500_000
MAX_ARGUMENTS = 1_000_000
"""Items in any one list of the file."""
MAX_OP_ARGUMENTS = 65_536
"""Leaves (references and plain values) in the arguments of one op."""
MAX_DEPTH = 4
"""Nesting of lists in one argument."""
MAX_STRING = 4096
MAX_RANK = 16
MAX_ELEMENTS = 2**40
"""Of one tensor."""
MAX_OUTPUTS = 65_536
MAX_NUMBER = 2**63 - 1

_LAYOUTS = frozenset({"strided"})
_MEMORY_FORMATS = frozenset({"contiguous_format", "preserve_format", "channels_last", "channels_last_3d"})
_AUTOCAST = frozenset({"bfloat16", "float16"})


def validate(dag: OpDag) -> None:
    """Raise `DagError`, naming the op, unless every invariant of `OpDag` holds."""
    if not dag.ops:
        raise DagError("OP-DAG has no ops")
    if len(dag.ops) > MAX_OPS:
        raise DagError(f"OP-DAG has {len(dag.ops)} ops, more than {MAX_OPS}")
    if dag.autocast is not None and dag.autocast not in _AUTOCAST:
        raise DagError(f"OP-DAG: autocast {dag.autocast!r} is not known")
    for text in (dag.name, *dag.notes, *dag.persistent_buffers):
        _check_text(text, "OP-DAG")
    names: set[str] = set()
    stored: set[tuple[str, str]] = set()
    for position, op in enumerate(dag.ops):
        where = f"OP-DAG op {position} ({op.name[:80]})"
        if op.id != position:
            raise DagError(f"{where}: its id is {op.id}")
        for text in (op.name, op.target, op.module):
            _check_text(text, where)
        if op.name in names:
            raise DagError(f"{where}: the name is taken by another op")
        names.add(op.name)
        if op.kind == "loss" and position != len(dag.ops) - 1:
            raise DagError(f"{where}: a loss op that is not the last op")
        _check_outputs(op, where)
        if op.kind in ("call", "loss"):
            _check_call(dag, op, where)
        else:
            _check_leaf(op, where)
            space = "data" if op.kind == "placeholder" else "weights"
            if (space, op.target) in stored:
                raise DagError(f"{where}: {op.target!r} is read by another op already")
            stored.add((space, op.target))
    _check_loss(dag, dag.loss)
    _check_parameters(dag)
    _check_evaluation(dag)


def _check_text(text: str, where: str) -> None:
    if len(text) > MAX_STRING:
        raise DagError(f"{where}: a text of {len(text)} characters, more than {MAX_STRING}")
    if not text.isprintable():
        raise DagError(f"{where}: a text with unprintable characters")


def _check_outputs(op: Op, where: str) -> None:
    if len(op.outputs) > MAX_OUTPUTS:
        raise DagError(f"{where}: {len(op.outputs)} outputs, more than {MAX_OUTPUTS}")
    if not op.outputs and op.kind != "call":
        raise DagError(f"{where}: it declares no output")
    if len(op.outputs) != 1 and op.kind != "call":
        raise DagError(f"{where}: a {op.kind} has one output")
    for meta in op.outputs:
        if meta.dtype not in DTYPE_BYTES:
            raise DagError(f"{where}: dtype {meta.dtype[:40]!r} is not supported")
        if len(meta.shape) > MAX_RANK:
            raise DagError(f"{where}: a tensor of rank {len(meta.shape)}, more than {MAX_RANK}")
        # Sizes are checked one by one first: a zero among them must not hide an absurd one.
        if any(not 0 <= size <= MAX_ELEMENTS for size in meta.shape) or math.prod(meta.shape) > MAX_ELEMENTS:
            raise DagError(f"{where}: a tensor of more than {MAX_ELEMENTS} elements")
    for count in (op.flops, op.backward_flops, op.saved_bytes):
        if not 0 <= count <= MAX_NUMBER:
            raise DagError(f"{where}: a cost out of range")


def _check_leaf(op: Op, where: str) -> None:
    if op.args or op.kwargs or op.mutates or op.aliases or op.random or op.no_grad:
        raise DagError(f"{where}: a {op.kind} takes no arguments and has no effects")
    if not op.target:
        raise DagError(f"{where}: a {op.kind} without a name")
    if op.only_in:
        raise DagError(f"{where}: a {op.kind} is in training and in evaluation")
    if op.kind == "placeholder" and op.meta.is_complex:
        raise DagError(f"{where}: data of dtype {op.meta.dtype}")
    if op.kind == "parameter" and not (op.meta.is_floating or op.meta.is_complex):
        raise DagError(f"{where}: a parameter of dtype {op.meta.dtype}")
    if op.requires_grad != (op.kind == "parameter"):
        raise DagError(f"{where}: of the inputs, parameters and no others require gradients")


def _check_call(dag: OpDag, op: Op, where: str) -> None:
    if op.kind == "call" and op.target not in ALLOWED:
        raise DagError(f"{where}: operator {op.target[:120]} is not on the allow-list")
    leaves = 0
    for arg in (*op.args, *(value for _, value in op.kwargs)):
        for leaf in _leaves(arg, where, 0):
            leaves += 1
            if leaves > MAX_OP_ARGUMENTS:
                raise DagError(f"{where}: more than {MAX_OP_ARGUMENTS} arguments")
            _check_value(dag, op, leaf, where)
    keywords = [name for name, _ in op.kwargs]
    if len(set(keywords)) != len(keywords) or any(not name.isidentifier() for name in keywords):
        raise DagError(f"{where}: keywords that are repeated or no identifiers")
    for other in (*op.mutates, *op.aliases):
        if not 0 <= other < op.id:
            raise DagError(f"{where}: it writes or aliases op {other}, which does not come before it")
    if any(dag.ops[other].kind == "parameter" for other in op.mutates):
        raise DagError(f"{where}: it writes a parameter")
    if any(dag.ops[other].kind == "placeholder" for other in op.mutates):
        raise DagError(f"{where}: it writes its input data")
    if op.requires_grad and not any(meta.is_floating or meta.is_complex for meta in op.outputs):
        raise DagError(f"{where}: it requires gradients but has no floating or complex output")
    if op.target == GETITEM:
        _check_getitem(dag, op, where)


def _leaves(arg: Arg, where: str, depth: int) -> Iterator[Arg]:
    if isinstance(arg, tuple):
        if depth >= MAX_DEPTH:
            raise DagError(f"{where}: arguments nest deeper than {MAX_DEPTH}")
        for item in arg:
            yield from _leaves(item, where, depth + 1)
    else:
        yield arg


def _check_value(dag: OpDag, op: Op, value: Arg, where: str) -> None:
    if isinstance(value, Ref):
        if not 0 <= value.op < op.id:
            raise DagError(f"{where}: it reads op {value.op}, which does not come before it")
        if len(dag.ops[value.op].outputs) != 1 and op.target != GETITEM:
            raise DagError(f"{where}: it reads a multi-output op without {GETITEM}")
    elif isinstance(value, Named):
        allowed = {
            "dtype": DTYPE_BYTES.keys(),
            "layout": _LAYOUTS,
            "memory_format": _MEMORY_FORMATS,
            "device": {""},
        }[value.kind]
        if value.name not in allowed:
            raise DagError(f"{where}: {value.kind} {value.name[:40]!r} is not supported")
    elif isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, int) and not -MAX_NUMBER - 1 <= value <= MAX_NUMBER:
        raise DagError(f"{where}: a number that does not fit 64 bits")


def _check_getitem(dag: OpDag, op: Op, where: str) -> None:
    if len(op.args) != 2 or op.kwargs or not isinstance(op.args[0], Ref) or type(op.args[1]) is not int:
        raise DagError(f"{where}: {GETITEM} takes a reference and a number")
    source = dag.ops[op.args[0].op]
    if source.kind != "call" or source.target == GETITEM or not 0 <= op.args[1] < len(source.outputs):
        raise DagError(f"{where}: {GETITEM} {op.args[1]} of an op with {len(source.outputs)} outputs")
    if op.outputs != (source.outputs[op.args[1]],):
        raise DagError(f"{where}: its shape is not that of the output it takes")


def _check_evaluation(dag: OpDag) -> None:
    """What a branch on `self.training` has alone is read there alone."""
    for op in dag.ops:
        where = f"OP-DAG op {op.id} ({op.name[:80]})"
        if op.only_in == "evaluation" and (
            op.requires_grad
            or op.flops
            or op.backward_flops
            or op.saved_bytes
            or any(dag.ops[written].only_in != "evaluation" for written in op.mutates)
        ):
            raise DagError(
                f"{where}: what is in evaluation alone writes nothing of training's, has no gradients and no costs"
            )
        if op.only_in != "evaluation" and any(dag.ops[source].only_in == "evaluation" for source in op.inputs()):
            raise DagError(f"{where}: it reads an op that is in evaluation alone")
    before = -1
    for form in dag.rewired:
        if not before < form.op < len(dag.ops):
            raise DagError(f"OP-DAG: rewired op {form.op} is out of order or not there")
        before = form.op
        op = dag.ops[form.op]
        where = f"OP-DAG op {op.id} ({op.name[:80]}) in evaluation"
        if op.kind not in ("call", "loss") or op.only_in or op.id in dag.constant:
            raise DagError(f"{where}: it can't read other values there")
        changed = replace(op, args=form.args, kwargs=form.kwargs)
        _check_call(dag, changed, where)
        if op.kind == "loss":
            _check_loss(dag, changed)
    for sources in dag.evaluation_inputs.values():
        for source in sources:
            if dag.ops[source].kind == "parameter" and not dag.users[source]:
                raise DagError(f"OP-DAG: parameter {dag.ops[source].target[:80]!r} is read in evaluation alone")
    read = {form.op: form.inputs() for form in dag.rewired}
    for op in dag.ops:
        if op.only_in != "training" and any(
            dag.ops[source].only_in == "training" for source in read.get(op.id, op.inputs())
        ):
            raise DagError(
                f"OP-DAG op {op.id} ({op.name[:80]}): in evaluation, it reads an op that is in training alone"
            )


def _check_loss(dag: OpDag, loss: Op) -> None:
    if loss.kind != "loss":
        raise DagError("OP-DAG has no loss op at its end")
    if loss.target != "loss" or len(loss.args) != 1 or not isinstance(loss.args[0], Ref) or loss.kwargs:
        raise DagError("OP-DAG: the loss op passes one value through")
    source = dag.ops[loss.args[0].op]
    if loss.meta.shape or not loss.meta.is_floating or source.outputs != loss.outputs:
        raise DagError("OP-DAG: the loss is not a floating-point scalar")
    if not loss.requires_grad:
        raise DagError("OP-DAG: the loss does not depend on any parameter")
    if loss.only_in:
        raise DagError("OP-DAG: the loss is in training and in evaluation")


def _check_parameters(dag: OpDag) -> None:
    ops = {op.id: op for op in dag.ops if op.kind == "parameter"}
    seen: set[str] = set()
    for parameter in dag.parameters:
        op = ops.pop(parameter.op, None)
        if op is None:
            raise DagError(
                f"OP-DAG: parameter {parameter.name[:80]!r} does not match a parameter op, or is listed twice"
            )
        if op.target != parameter.name:
            raise DagError(f"OP-DAG: parameter {parameter.name[:80]!r} and its op {op.target[:80]!r} differ")
        for name in (parameter.name, *parameter.aliases):
            _check_text(name, "OP-DAG parameter")
            if name in seen:
                raise DagError(f"OP-DAG: two parameters are named {name[:80]!r}")
            seen.add(name)
        if not 0 <= parameter.order <= MAX_NUMBER:
            raise DagError(f"OP-DAG: parameter {parameter.name[:80]!r} has an order out of range")
    if ops:
        missing = next(iter(ops.values()))
        raise DagError(f"OP-DAG: parameter op {missing.name[:80]!r} is not listed under parameters")
    orders = [parameter.order for parameter in dag.parameters]
    if len(set(orders)) != len(orders):
        raise DagError("OP-DAG: two parameters have the same order")
    for name, aliases in dag.buffer_aliases:
        for text in (name, *aliases):
            _check_text(text, "OP-DAG buffer")
