"""Short texts for ops and their arguments, the same in every view."""

from __future__ import annotations

from dag.graph import Arg, Named, Op, OpDag, Ref, TensorMeta

_CATEGORIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("compute", ("linear", "matmul", "mm", "bmm", "addmm", "conv", "einsum", "attention", "lstm", "gru", "baddbmm", "rnn")),
    ("norm", ("norm",)),
    ("random", ("dropout", "bernoulli", "rand", "normal", "multinomial")),
    ("lookup", ("embedding", "index", "gather", "scatter", "select", "slice", "getitem", "take")),
    (
        "layout",
        ("view", "reshape", "transpose", "permute", "expand", "squeeze", "flatten", "contiguous", "chunk", "split", "cat",
         "stack", "unbind", "clone", "detach", "alias", "to", "_to_copy", "t", "pad", "repeat", "roll", "movedim"),
    ),
    ("activation", ("relu", "gelu", "silu", "tanh", "sigmoid", "softmax", "elu", "softplus", "swish", "mish")),
)  # fmt: skip
_EXACT = frozenset({"to", "t", "cat", "mm"})


def count_text(number: float) -> str:
    """1234567 -> `1.23 M`, with at most three significant digits."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def meta_text(meta: TensorMeta) -> str:
    """`float32[8, 128]`."""
    return f"{meta.dtype}[{', '.join(map(str, meta.shape))}]"


def short_target(op: Op) -> str:
    """`aten.linear.default` -> `linear`; `add.Tensor` keeps only `add`; data keys and names stay as they are."""
    if op.kind != "call":
        return op.target
    parts = op.target.split(".")
    return parts[1] if len(parts) > 1 else op.target


def argument_text(dag: OpDag, arg: Arg) -> str:
    """An argument as a person would write it; calls by the op's name, parameters and data by their own."""
    if isinstance(arg, Ref):
        return dag.ops[arg.op].name if dag.ops[arg.op].kind == "call" else dag.ops[arg.op].target
    if isinstance(arg, Named):
        return arg.name
    if isinstance(arg, tuple):
        return f"[{', '.join(argument_text(dag, item) for item in arg)}]"
    return repr(arg)


def call_text(dag: OpDag, op: Op) -> str:
    """`linear(x, weight, None)`."""
    arguments = [argument_text(dag, arg) for arg in op.args]
    arguments += [f"{name}={argument_text(dag, arg)}" for name, arg in op.kwargs]
    return f"{short_target(op)}({', '.join(arguments)})"


def category(op: Op) -> str:
    """A coarse class of an op, for colour: input, loss, compute, norm, random, lookup, layout, activation or other."""
    if op.kind == "placeholder":
        return "input"
    if op.kind == "loss":
        return "loss"
    if op.kind != "call":
        return "other"
    name = short_target(op)
    if "loss" in name or "cross_entropy" in name:
        return "loss"
    for found, words in _CATEGORIES:
        if any(name == word if word in _EXACT else word in name for word in words):
            return found
    return "other"


def home_module(op: Op) -> str:
    """The module path that an op belongs to: a parameter's or buffer's name says it, a call carries it."""
    if op.kind in ("parameter", "buffer"):
        return op.target.rpartition(".")[0]
    return op.module
