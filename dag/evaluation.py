"""What an op does in evaluation: dropout off, running statistics used and left alone. Needs no torch.

The captured graph has training behaviour baked into its arguments; these flip them back. What a branch on `self.training`
does there besides is in the OP-DAG itself (`dag.capture.both_modes`).
"""

from __future__ import annotations

from dataclasses import replace

from dag.graph import Arg, Op, OpDag

# Packet -> position and name of the training flag.
_DROPOUT = dict.fromkeys(
    ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout"), (2, "train")
)
_RECURRENT = {"lstm": (6, "train"), "gru": (6, "train"), "rnn_tanh": (6, "train"), "rnn_relu": (6, "train")}
_RRELU = {"rrelu": (3, "training")}
_NORMS = {"batch_norm": (5, "training"), "instance_norm": (5, "use_input_stats")}
_ATTENTION = {"scaled_dot_product_attention": (4, "dropout_p")}


def evaluation_form(op: Op, dag: OpDag) -> Op | None:
    """The op as it runs in evaluation; None when it is left out.

    In-place writes to buffers that nothing reads (batch norm's count of batches) are left out, so that evaluating changes
    no state.
    """
    if op.only_in == "training":
        return None
    form = dag.rewired_ops.get(op.id)
    if form is not None:
        op = replace(op, args=form.args, kwargs=form.kwargs)
    if op.kind != "call" or not op.target.startswith("aten."):
        return op
    if _only_writes_buffers(op, dag):
        return None
    packet = op.target.split(".")[1].removesuffix("_")
    for table in (_DROPOUT, _RECURRENT, _RRELU):
        if packet in table:
            return replace(_with(op, *table[packet], False), random=False)
    if packet in _ATTENTION:
        position, name = _ATTENTION[packet]
        return replace(_with(op, position, name, 0.0), random=False) if op.random else op
    if packet in _NORMS:
        # Without running statistics torch normalises by the batch's own in evaluation too.
        if _get(op, 3, "running_mean") is None or _get(op, 4, "running_var") is None:
            return op
        return replace(_with(op, *_NORMS[packet], False), mutates=())
    return op


def _only_writes_buffers(op: Op, dag: OpDag) -> bool:
    in_place = op.target.split(".")[1].endswith("_")
    return (
        in_place
        and bool(op.mutates)
        and not dag.users[op.id]
        and any(dag.ops[target].kind == "buffer" for target in op.mutates)
    )


def _get(op: Op, position: int, name: str) -> Arg:
    if position < len(op.args):
        return op.args[position]
    return dict(op.kwargs).get(name)


def _with(op: Op, position: int, name: str, value: Arg) -> Op:
    """`op` with one argument changed, wherever it stands."""
    if position < len(op.args):
        return replace(op, args=(*op.args[:position], value, *op.args[position + 1 :]))
    return replace(op, kwargs=(*((key, arg) for key, arg in op.kwargs if key != name), (name, value)))
