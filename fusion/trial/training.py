"""The OP-DAG beside the model in training: what forward takes from elsewhere is in the OP-DAG as it was at capture; whether that is
the same computation shows in the loss and in the gradients of the first micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dag.capture import Captured
from dag.graph import OpDag
from fusion.errors import CaptureError
from fusion.trial.model import Trial
from fusion.trial.op_dag import close, run, tolerance

_MAX_BYTES = 2**30
"""For gradients, twice, and what backward keeps: more is not asked of the machine that a job is submitted from."""


def compared_parameters(dag: OpDag) -> Sequence[str]:
    """Those whose gradients are compared: all, or none where that would take much memory."""
    names = [parameter.name for parameter in dag.parameters]
    held = sum(dag.ops[parameter.op].output_bytes for parameter in dag.parameters)
    return names if 2 * held + sum(op.saved_bytes for op in dag.ops) <= _MAX_BYTES else []


def compare_training(captured: Captured, example: Mapping[str, Tensor], expected: Trial) -> None:
    """Raise `CaptureError` when the OP-DAG gives another loss or other gradients than `expected`, what the model gave.

    In training each random op has a seed of its own; here all draw from one generator, as the model's did. An OP-DAG that does
    not draw as many numbers (the model throws some away) is not compared.
    """
    ops = [replace(op, random=False) for op in captured.dag.training]
    found = run(captured, ops, example, list(expected.gradients))
    if not torch.equal(found.random_state, expected.random_state):
        return
    if not close(captured, found.loss, expected.loss):
        raise CaptureError(
            f"on the first micro-batch the captured model has loss {float(found.loss):.6g} and the model itself "
            f"{float(expected.loss):.6g}; forward or the loss depends on something that changes outside the model (a global, "
            "a counter, a file), which is taken once, at capture: make it a buffer of the model or part of the data"
        )
    name = _another_gradient(captured, found, expected)
    if name is not None:
        raise CaptureError(
            f"on the first micro-batch the captured model has the loss of the model itself, but another gradient of {name}; "
            "forward does something to gradients that can't be captured: use torch's own operators, detach() and no_grad()"
        )


def _another_gradient(captured: Captured, found: Trial, expected: Trial) -> str | None:
    """A parameter with another gradient, but for rounding, of which even a gradient that should be zero has some. Where one is no
    number, nothing is said.
    """
    whole = sum(_norm(value) ** 2 for value in expected.gradients.values()) ** 0.5
    if not math.isfinite(whole):
        return None
    allowed = 10 * tolerance(captured)
    for name, value in expected.gradients.items():
        other = found.gradients[name]
        if value is None and other is None:
            continue
        apart = _norm(other if value is None else value if other is None else value - other)
        if not apart <= allowed * (_norm(value) + 1e-3 * whole):
            return name
    return None


def _norm(value: Tensor | None) -> float:
    return 0.0 if value is None else float(torch.linalg.vector_norm(value))
