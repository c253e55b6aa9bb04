"""Captures a model and its loss as an OP-DAG: `torch.export` in training mode, then plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dag.capture.custom_gradients import check_hooks
from dag.capture.modes import ready_for_training
from dag.capture.objective import Loss, check_example
from dag.capture.trace import Trace, trace
from dag.capture.unregistered import notes_on_unregistered
from dag.cut import differentiated
from dag.graph import Op, OpDag
from dag.validate import validate
from fusion.errors import CaptureError, DagError

AUTOCAST_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Captured:
    """An OP-DAG and the tensors of its parameters, buffers and constants."""

    dag: OpDag
    tensors: dict[str, torch.Tensor]
    """Every tensor of `model.state_dict()` under its key (tied ones under each of their keys, as the same tensor), the
    non-persistent buffers that the DAG reads, and the constants under `constant/NAME`. Detached, not copied."""


def capture(
    model: nn.Module,
    example: Mapping[str, torch.Tensor],
    loss: Loss,
    *,
    name: str = "model",
    autocast: str | None = None,
) -> Captured:
    """Capture `model` and `loss` on one micro-batch.

    `example` maps data keys to tensors of a micro-batch's shape: `inputs` goes to `forward` first, `targets` to the loss,
    any other key by name. `loss` is `cross_entropy`, `mse`, `model` when forward returns the loss, or a function of
    (output, targets). `autocast` (`bfloat16`) traces model and loss under mixed precision; its casts become ops.

    A model in evaluation mode is captured in training mode. Parameters without `requires_grad` are captured as buffers.
    Raises `CaptureError` with the user's file and line.
    """
    check_example(model, example, loss)
    if autocast is not None and autocast not in AUTOCAST_DTYPES:
        raise CaptureError(f"autocast {autocast!r} is not known; use {' or '.join(AUTOCAST_DTYPES)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise CaptureError(f"no parameter of {type(model).__name__} requires a gradient; there is nothing to train")
    check_hooks(model)
    found = trace(model, loss, example, autocast, lambda objective: ready_for_training(objective.model))
    ops, names = found.ops, found.names
    dag = OpDag(
        ops=ops,
        parameters=names.parameters(ops),
        persistent_buffers=names.persistent_buffers(ops),
        name=name,
        autocast=autocast,
        notes=(
            *_notes(ops),
            *found.notes,
            *notes_on_unregistered(model, names.constants(ops)),
        ),
        buffer_aliases=names.buffer_aliases(ops),
    )
    if not dag.loss.requires_grad:
        raise CaptureError(
            "the loss does not depend on any parameter that requires a gradient; nothing would be trained"
        )
    _refuse_without_derivative(found, dag)
    try:
        validate(dag)
    except DagError as error:
        raise CaptureError(f"this model can't be captured: {error}") from error
    return Captured(dag, names.tensors(ops))


def _refuse_without_derivative(found: Trace, dag: OpDag) -> None:
    """Raise `CaptureError` where a gradient would have to go back through an operator that torch has no derivative of."""
    wanting = differentiated(dag)
    for op, draft, seen in zip(dag.ops, found.drafts, found.observations, strict=True):
        if op.id in wanting and not seen.differentiable:
            place = f"{draft.where}: " if draft.where else ""
            raise CaptureError(
                f"{place}torch has no derivative of {op.target}, and the loss depends on parameters through it; compute its "
                "argument under torch.no_grad() or detach() it, or use another operator"
            )


def _notes(ops: Sequence[Op]) -> list[str]:
    unusual = {"float64"} & {meta.dtype for op in ops for meta in op.outputs}
    return [f"some values are of dtype {dtype}, which is slow on most devices" for dtype in sorted(unusual)]
