"""An OP-DAG, run here in one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dag.capture import Captured
from dag.graph import Op
from executor.interpreter import Interpreter
from fusion.trial.model import Trial

_HALF = ("bfloat16", "float16")


def run(captured: Captured, ops: Sequence[Op], example: Mapping[str, Tensor], parameters: Sequence[str] = ()) -> Trial:
    """What `ops`, all of the OP-DAG's or another form of them, give for `example`; with gradients of `parameters`, if any."""
    leaves = [op for op in ops if op.kind not in ("call", "loss")]
    calls = [op for op in ops if op.kind in ("call", "loss")]
    written = {target for op in calls for target in op.mutates}
    interpreter = Interpreter(calls, [op.id for op in leaves], [captured.dag.loss.id], device=torch.device("cpu"))
    held: dict[str, Tensor] = {}
    for op in leaves:
        value = example[op.target] if op.kind == "placeholder" else captured.tensors[op.target]
        if op.kind == "parameter":
            value = held[op.target] = value.detach().requires_grad_(bool(parameters))
        interpreter.bind(op.id, value.clone() if op.id in written else value)
    values = interpreter.fresh()
    with torch.set_grad_enabled(bool(parameters)), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        interpreter.run(values, 0, 0)
        after = torch.get_rng_state()
        loss = values[interpreter.slot[captured.dag.loss.id]]
        if not parameters:
            return Trial(loss, after)
        gradients = torch.autograd.grad(loss, [held[name] for name in parameters], allow_unused=True)
    return Trial(loss.detach(), after, dict(zip(parameters, gradients, strict=True)))


def written_by(captured: Captured) -> list[Tensor]:
    """What forward writes in place: buffers, and parameters that are not trained, as a teacher's that follows its student."""
    leaves = (captured.dag.ops[op] for op in sorted(captured.dag.written))
    return [captured.tensors[op.target] for op in leaves if op.kind == "buffer"]


def tolerance(captured: Captured) -> float:
    """Relative, for rounding: torch may take another path to the same value."""
    half = any(meta.dtype in _HALF for op in captured.dag.ops for meta in op.outputs)
    return 2e-2 if half else 1e-4


def close(captured: Captured, found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding."""
    allowed = tolerance(captured)
    return torch.allclose(found.double(), expected.double(), rtol=allowed, atol=allowed / 10, equal_nan=True)
