"""Captures what a model does after `eval()`, where that is more than flags, and joins it into its OP-DAG."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dag.capture.both_modes import joined
from dag.capture.modes import in_evaluation
from dag.capture.names import CONSTANT_PREFIX
from dag.capture.objective import Loss
from dag.capture.trace import trace
from dag.capture.training import Captured
from dag.graph import OpDag
from dag.validate import validate
from fusion.errors import CaptureError, DagError


def with_evaluation(captured: Captured, model: nn.Module, example: Mapping[str, torch.Tensor], loss: Loss) -> Captured:
    """`captured`, which came of `capture` with the same model, example and loss, with evaluation as it is in forward.

    Raises `CaptureError` when forward can't be captured in evaluation mode.
    """
    training = captured.dag
    found = trace(model, loss, example, training.autocast, in_evaluation)
    evaluation = OpDag(
        ops=found.ops,
        parameters=found.names.parameters(found.ops),
        persistent_buffers=found.names.persistent_buffers(found.ops),
        buffer_aliases=found.names.buffer_aliases(found.ops),
    )
    tensors = dict(captured.tensors)
    constants: dict[str, str] = {}
    for name, value in found.names.tensors(found.ops).items():
        if name.startswith(CONSTANT_PREFIX):
            constants[name] = _called(name, value, captured.tensors, tensors)
        tensors.setdefault(constants.get(name, name), value)
    dag = joined(training, evaluation, constants)
    if dag is None:
        raise CaptureError(
            "in evaluation, forward uses parameters that training does not use, or writes what training does not write"
        )
    try:
        validate(dag)
    except DagError as error:
        raise CaptureError(str(error)) from error
    read = {op.target for op in dag.ops}
    return Captured(dag, {name: value for name, value in tensors.items() if name in captured.tensors or name in read})


def _called(
    name: str, value: torch.Tensor, of_training: Mapping[str, torch.Tensor], taken: Mapping[str, torch.Tensor]
) -> str:
    """The name of the same constant in training's trace; a free one where there is none."""
    if value.is_meta and name in of_training:
        return name  # There are no values that could differ.
    for other, held in of_training.items():
        if other.startswith(CONSTANT_PREFIX) and _equal(held, value):
            return other
    while name in taken:
        name += "_in_evaluation"
    return name


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape or one.is_meta or other.is_meta:
        return False
    return torch.equal(one, other)
