"""The OP-DAG as bytes: msgpack of plain values with a schema version and a content hash. Reading runs nothing.

Layout: `[magic, schema version, sha256 of body, body]`, where body is the msgpack of
`[name, autocast, notes, persistent buffers, parameters, ops, buffer aliases]`, with the rewired ops as one item more where
there are some, and an argument is nil, a boolean, an integer, a float, a string, or a tagged list: `[0, op]` a reference,
`[1, kind, name]` a named torch object, `[2, item...]` a list.
"""

from __future__ import annotations

import hashlib
from typing import Any, NoReturn

import msgpack

from dag.graph import SCHEMA_VERSION, Arg, Named, Op, OpDag, Parameter, Ref, Rewired, TensorMeta
from dag.validate import (
    MAX_ARGUMENTS,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_STRING,
    validate,
)
from fusion.errors import DagError

MAGIC = "fusion-dag"
_REF, _NAMED, _LIST = 0, 1, 2
_KINDS = ("placeholder", "parameter", "buffer", "constant", "call", "loss")
_NAMED_KINDS = ("dtype", "layout", "memory_format", "device")
_FLAGS = ("no_grad", "random", "requires_grad")
_ONLY_IN = {0: "", 8: "training", 16: "evaluation"}
"""By the bits of the flags above those."""


def digest(data: bytes) -> str:
    """SHA-256 of serialised bytes, in hex: the blob's name."""
    return hashlib.sha256(data).hexdigest()


def dumps(dag: OpDag) -> bytes:
    """Serialise; equal DAGs give equal bytes. Raises `DagError` when `dag` is not valid."""
    validate(dag)
    body: bytes = msgpack.packb(
        [
            dag.name,
            dag.autocast,
            list(dag.notes),
            list(dag.persistent_buffers),
            [[p.op, p.name, list(p.aliases), p.order] for p in dag.parameters],
            [_pack_op(op) for op in dag.ops],
            [[name, list(aliases)] for name, aliases in dag.buffer_aliases],
            *([[_pack_rewired(form) for form in dag.rewired]] if dag.rewired else []),
        ]
    )
    packed: bytes = msgpack.packb([MAGIC, SCHEMA_VERSION, hashlib.sha256(body).digest(), body])
    return packed


def loads(data: bytes) -> OpDag:
    """Read and validate. Raises `DagError` for anything that is not a well-formed, allowed OP-DAG."""
    envelope = _unpack(data)
    if not isinstance(envelope, list) or len(envelope) != 4 or envelope[0] != MAGIC:
        raise DagError("this is not an OP-DAG file")
    _, version, checksum, body = envelope
    if version != SCHEMA_VERSION:
        raise DagError(f"OP-DAG of schema version {version!r}; this Fusion reads version {SCHEMA_VERSION}")
    if not isinstance(body, bytes) or hashlib.sha256(body).digest() != checksum:
        raise DagError("OP-DAG content does not match its hash; it was damaged or changed on the way")
    dag = _read_dag(_unpack(body))
    validate(dag)
    return dag


def _unpack(data: bytes) -> Any:
    if len(data) > MAX_BYTES:
        raise DagError(f"OP-DAG of {len(data)} bytes is larger than the limit of {MAX_BYTES}")
    try:
        return msgpack.unpackb(
            data,
            max_str_len=MAX_STRING,
            max_array_len=MAX_ARGUMENTS,
            max_bin_len=MAX_BYTES,
            max_map_len=0,
            max_ext_len=0,
            strict_map_key=True,
        )
    except Exception as error:
        # msgpack raises many kinds, among them ValueError, StackError and UnicodeDecodeError.
        raise DagError(f"OP-DAG is not readable msgpack: {type(error).__name__} {error}") from None


def _pack_op(op: Op) -> list[Any]:
    flags = sum(1 << bit for bit, name in enumerate(_FLAGS) if getattr(op, name))
    flags += next(bits for bits, name in _ONLY_IN.items() if name == op.only_in)
    return [
        op.name,
        _KINDS.index(op.kind),
        op.target,
        *_pack_call(op.args, op.kwargs),
        [[list(meta.shape), meta.dtype] for meta in op.outputs],
        op.module,
        flags,
        list(op.mutates),
        list(op.aliases),
        op.flops,
        op.backward_flops,
        op.saved_bytes,
    ]


def _pack_call(args: tuple[Arg, ...], kwargs: tuple[tuple[str, Arg], ...]) -> list[Any]:
    return [[_pack_arg(arg) for arg in args], [[name, _pack_arg(arg)] for name, arg in kwargs]]


def _pack_rewired(form: Rewired) -> list[Any]:
    return [form.op, *_pack_call(form.args, form.kwargs)]


def _pack_arg(arg: Arg) -> Any:
    if isinstance(arg, Ref):
        return [_REF, arg.op]
    if isinstance(arg, Named):
        return [_NAMED, arg.kind, arg.name]
    if isinstance(arg, tuple):
        return [_LIST, *(_pack_arg(item) for item in arg)]
    return arg


def _refuse(where: str, wanted: str) -> NoReturn:
    raise DagError(f"OP-DAG: {where} is not {wanted}")


def _text(value: Any, where: str) -> str:
    if type(value) is not str:
        _refuse(where, "text")
    return value


def _natural(value: Any, where: str) -> int:
    if type(value) is not int or value < 0:
        _refuse(where, "a natural number")
    return value


def _items(value: Any, where: str, length: int | None = None) -> list[Any]:
    if type(value) is not list or (length is not None and len(value) != length):
        _refuse(where, "a list" if length is None else f"a list of {length}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    return tuple(_text(item, where) for item in _items(value, where))


def _naturals(value: Any, where: str) -> tuple[int, ...]:
    return tuple(_natural(item, where) for item in _items(value, where))


def _read_dag(fields: Any) -> OpDag:
    fields = _items(fields, "the body")
    name, autocast, notes, buffers, parameters, ops, buffer_aliases = _items(fields[:7], "the body", 7)
    rewired = _items(fields[7:], "what follows the body", 1)[0] if len(fields) > 7 else []
    return OpDag(
        ops=tuple(_read_op(index, op) for index, op in enumerate(_items(ops, "ops"))),
        parameters=tuple(_read_parameter(item) for item in _items(parameters, "parameters")),
        persistent_buffers=_texts(buffers, "persistent buffers"),
        name=_text(name, "the name"),
        autocast=None if autocast is None else _text(autocast, "autocast"),
        notes=_texts(notes, "notes"),
        buffer_aliases=tuple(
            (_text(pair[0], "a buffer's name"), _texts(pair[1], "a buffer's aliases"))
            for pair in (_items(item, "a buffer's aliases", 2) for item in _items(buffer_aliases, "buffer aliases"))
        ),
        rewired=tuple(_read_rewired(item) for item in _items(rewired, "rewired ops")),
    )


def _read_parameter(fields: Any) -> Parameter:
    op, name, aliases, order = _items(fields, "a parameter", 4)
    return Parameter(
        op=_natural(op, "a parameter's op"),
        name=_text(name, "a parameter's name"),
        aliases=_texts(aliases, "a parameter's aliases"),
        order=_natural(order, "a parameter's order"),
    )


def _read_op(index: int, fields: Any) -> Op:
    where = f"op {index}"
    name, kind, target, args, kwargs, outputs, module, flags, mutates, aliases, flops, backward_flops, saved = _items(
        fields, where, 13
    )
    if type(kind) is not int or not 0 <= kind < len(_KINDS):
        _refuse(f"{where}: its kind", "known")
    if type(flags) is not int or flags < 0 or flags & ~7 not in _ONLY_IN:
        _refuse(f"{where}: its flags", "known")
    given, named = _read_call(args, kwargs, where)
    metas = [_items(meta, f"{where}: an output", 2) for meta in _items(outputs, f"{where}: outputs")]
    return Op(
        id=index,
        name=_text(name, f"{where}: its name"),
        kind=_KINDS[kind],  # type: ignore[arg-type]
        target=_text(target, f"{where}: its target"),
        args=given,
        kwargs=named,
        outputs=tuple(
            TensorMeta(_naturals(shape, f"{where}: a shape"), _text(dtype, f"{where}: a dtype"))
            for shape, dtype in metas
        ),
        module=_text(module, f"{where}: its module"),
        no_grad=bool(flags & 1),
        random=bool(flags & 2),
        requires_grad=bool(flags & 4),
        mutates=_naturals(mutates, f"{where}: what it writes"),
        aliases=_naturals(aliases, f"{where}: its aliases"),
        flops=_natural(flops, f"{where}: its FLOPs"),
        backward_flops=_natural(backward_flops, f"{where}: its FLOPs"),
        saved_bytes=_natural(saved, f"{where}: its saved bytes"),
        only_in=_ONLY_IN[flags & ~7],  # type: ignore[arg-type]
    )


def _read_call(args: Any, kwargs: Any, where: str) -> tuple[tuple[Arg, ...], tuple[tuple[str, Arg], ...]]:
    pairs = [_items(pair, f"{where}: a keyword", 2) for pair in _items(kwargs, f"{where}: keywords")]
    return (
        tuple(_read_arg(arg, where, 0) for arg in _items(args, f"{where}: arguments")),
        tuple((_text(key, f"{where}: a keyword"), _read_arg(arg, where, 0)) for key, arg in pairs),
    )


def _read_rewired(fields: Any) -> Rewired:
    op, args, kwargs = _items(fields, "a rewired op", 3)
    number = _natural(op, "a rewired op's number")
    return Rewired(number, *_read_call(args, kwargs, f"op {number} in evaluation"))


def _read_arg(value: Any, where: str, depth: int) -> Arg:
    if value is None or type(value) in (bool, int, float, str):
        return value  # type: ignore[no-any-return]
    if depth >= MAX_DEPTH:
        raise DagError(f"OP-DAG: {where}: arguments nest deeper than {MAX_DEPTH}")
    if type(value) is list and value and type(value[0]) is int:
        tag, *rest = value
        if tag == _REF and len(rest) == 1:
            return Ref(_natural(rest[0], f"{where}: a reference"))
        if tag == _NAMED and len(rest) == 2 and rest[0] in _NAMED_KINDS:
            return Named(rest[0], _text(rest[1], f"{where}: a name"))
        if tag == _LIST:
            return tuple(_read_arg(item, where, depth + 1) for item in rest)
    _refuse(f"{where}: an argument", "a plain value")
