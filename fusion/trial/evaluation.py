"""The OP-DAG beside the model after `eval()`: flags of operators are not all that `self.training` may decide."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dag.capture import Captured, with_evaluation
from dag.capture.blame import line_of_branch
from dag.capture.modes import in_evaluation
from dag.capture.objective import Objective
from dag.evaluation import evaluation_form
from dag.graph import Op
from fusion.errors import CaptureError, FusionError
from fusion.trial.model import folder_of, left_alone, loss_of
from fusion.trial.op_dag import close, run, written_by
from fusion.user_code import explain


def evaluating(
    model: nn.Module, loss: str | Callable[..., Any], example: Mapping[str, Tensor], captured: Captured
) -> Captured:
    """`captured`, so that its evaluation is what the model computes after `model.eval()`.

    Flags of operators, as of dropout, are known; where `self.training` decides more, evaluation is captured too.
    Raises `CaptureError` when that can't be done. A model that throws away random numbers in evaluation is not compared.
    """
    objective = Objective(model, loss)
    usual = _compare(objective, example, captured)
    # On the first micro-batch of a new model, what differs may be little.
    if usual.right and not usual.model_draws and not evaluates_otherwise(model, loss, captured):
        return captured
    why = ""
    try:
        found = with_evaluation(captured, model, example, loss)
        if _compare(objective, example, found).right:
            return found
    except CaptureError as error:
        why = f"; what it does in evaluation can't be captured by itself: {error}"
    if usual.right and (not usual.draws or usual.model_draws):
        return captured
    place = _branch(objective, own=True) or _branch(objective, own=False)
    raise CaptureError(
        f"{place + ': ' if place else ''}evaluation would be wrong: after model.eval() the loss of the first micro-batch is "
        f"{usual.expected:.6g}, the captured model's is {usual.found:.6g}{' and random' if usual.draws else ''}; forward does "
        f"something else in evaluation than in training{why}; let it do the same, or leave out train.eval_every"
    )


def evaluates_otherwise(model: nn.Module, loss: str | Callable[..., Any], captured: Captured) -> bool:
    """Whether evaluation may be more than flags, by what needs no numbers: random operators that flags leave in the OP-DAG, and
    branches on `self.training` in code of one's own.
    """
    return any(form.random for form in _forms(captured)) or bool(_branch(Objective(model, loss), own=True))


def _forms(captured: Captured) -> list[Op]:
    dag = captured.dag
    return [form for op in dag.ops if (form := evaluation_form(op, dag)) is not None]


@dataclass(frozen=True)
class _Comparison:
    """Losses of the first micro-batch in evaluation."""

    expected: float
    found: float
    right: bool
    draws: bool
    """The OP-DAG draws random numbers in evaluation."""
    model_draws: bool
    """So does the model."""


def _compare(objective: Objective, example: Mapping[str, Tensor], captured: Captured) -> _Comparison:
    forms = _forms(captured)
    with _moved_on(objective.model, captured, forms):
        with left_alone(objective, written_by(captured)):
            try:
                with in_evaluation(objective), torch.no_grad():
                    torch.manual_seed(0)
                    before = torch.get_rng_state()
                    expected = loss_of(objective, example, captured.dag.autocast)
                    after = torch.get_rng_state()
            except Exception as error:
                told = str(error) if isinstance(error, FusionError) else explain(error, folder_of(objective.model))
                raise CaptureError(
                    f"the model fails in evaluation mode (model.eval()) on the first micro-batch: {told}; let forward "
                    "return in evaluation what the loss takes, or leave out train.eval_every"
                ) from error
        # Workers have the weights as they are in training.
        found = run(captured, [replace(form, random=False) for form in forms], example)
    model_draws = not torch.equal(after, before)
    return _Comparison(
        expected=float(expected),
        found=float(found.loss),
        right=close(captured, found.loss, expected) if torch.equal(found.random_state, after) else model_draws,
        draws=any(form.random for form in forms),
        model_draws=model_draws,
    )


def _branch(objective: Objective, *, own: bool) -> str:
    """`file:line` of a branch on `self.training` in one's own code, or in a library's, or ""."""
    for module in {type(module): module for module in objective.modules()}.values():
        code = getattr(type(module).forward, "__code__", None)
        if code is not None and own != ("site-packages" in code.co_filename):
            line = line_of_branch(module, "training")
            if line:
                return line
    return ""


@contextlib.contextmanager
def _moved_on(model: nn.Module, captured: Captured, forms: list[Op]) -> Iterator[None]:
    """Within it, what evaluation would write is not as it was made: a write that does little at first shows in the loss."""
    ops = captured.dag.ops
    names = {ops[op].target for form in forms for op in form.mutates if ops[op].kind == "buffer"}
    buffers = dict(model.named_buffers(remove_duplicate=False))
    moved = [(buffers[name], captured.tensors[name]) for name in names if name in buffers]
    kept = [(held, held.clone()) for _, held in moved if held.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for buffer, held in moved:
            if held.is_floating_point():
                value = held * (1 + torch.rand(held.shape, generator=generator).to(held))
                buffer.copy_(value)
                held.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for held, value in kept:
                held.copy_(value)
