"""The user's model on the first real micro-batch, here, before a job goes anywhere, and the OP-DAG beside it.

Capture works without numbers, so an index beyond an embedding table or a class beyond the logits would only show in a
worker, far from the line that matters. And what forward takes from elsewhere (a global, `self.training`) is in the OP-DAG
as it was at capture; whether that is the same computation shows in the loss.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dag.capture import Captured, with_evaluation
from dag.capture.blame import line_of_branch, module_of_exception, module_words
from dag.capture.example_words import example_words
from dag.capture.export import casting
from dag.capture.modes import in_evaluation, ready_for_training
from dag.capture.objective import TARGETS, Objective
from dag.capture.python_state import PythonState
from dag.evaluation import evaluation_form
from dag.graph import Op
from executor.interpreter import Interpreter
from fusion.errors import CaptureError, FusionError
from fusion.user_code import explain

_HALF = ("bfloat16", "float16")


@dataclass(frozen=True)
class Trial:
    """The loss of a micro-batch, and torch's random state after it; it began with seed 0."""

    loss: Tensor
    random_state: Tensor


def try_once(
    model: nn.Module, loss: str | Callable[..., Any], example: Mapping[str, Tensor], autocast: str | None = None
) -> Trial:
    """Try `example`; the model's buffers and attributes and torch's random state are afterwards what they were.

    Raises `CaptureError` with the user's line and the range of the data when it fails.
    """
    objective = Objective(model, loss)
    try:
        with ready_for_training(model), _left_alone(objective):
            torch.manual_seed(0)
            found = _loss_of(objective, example, autocast)
            return Trial(found, torch.get_rng_state())
    except FusionError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model fails on the first micro-batch: {_placed(error, model)}"
            f"{_advice(error, example)} (the first micro-batch has {example_words(example, ranges=True)})"
        ) from error


def _placed(error: Exception, model: nn.Module) -> str:
    """With the line of the user's; a model that is made of torch's own modules alone has none, but a module."""
    told = explain(error, _folder_of(model))
    found = module_of_exception(error, model) if told.startswith(type(error).__name__) else None
    return f"{module_words(found[0], type(found[1]).__name__)}: {told}" if found is not None else told


def _advice(error: Exception, example: Mapping[str, Tensor]) -> str:
    whole = [name for name, value in example.items() if name != TARGETS and not value.is_floating_point()]
    if whole and re.search(r"same dtype|expected scalar type", str(error)):
        return f"; whole numbers go in as such: make {' and '.join(whole)} floats in the data, or in forward"
    return ""


def compare_training(captured: Captured, example: Mapping[str, Tensor], expected: Trial) -> None:
    """Raise `CaptureError` when the OP-DAG gives another loss than `expected`, what the model gave.

    In training each random op has a seed of its own; here all draw from one generator, as the model's did. An OP-DAG that does
    not draw as many numbers (the model throws some away) is not compared.
    """
    found = _run(captured, [replace(op, random=False) for op in captured.dag.training], example)
    if torch.equal(found.random_state, expected.random_state) and not _close(captured, found.loss, expected.loss):
        raise CaptureError(
            f"on the first micro-batch the captured model has loss {float(found.loss):.6g} and the model itself "
            f"{float(expected.loss):.6g}; forward or the loss depends on something that changes outside the model (a global, "
            "a counter, a file), which is taken once, at capture: make it a buffer of the model or part of the data"
        )


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
    with _left_alone(objective), in_evaluation(objective), _moved_on(objective.model, captured, forms):
        try:
            torch.manual_seed(0)
            before = torch.get_rng_state()
            expected = _loss_of(objective, example, captured.dag.autocast)
        except Exception as error:
            told = str(error) if isinstance(error, FusionError) else explain(error, _folder_of(objective.model))
            raise CaptureError(
                f"the model fails in evaluation mode (model.eval()) on the first micro-batch: {told}; let forward "
                "return in evaluation what the loss takes, or leave out train.eval_every"
            ) from error
        after = torch.get_rng_state()
        found = _run(captured, [replace(form, random=False) for form in forms], example)
    model_draws = not torch.equal(after, before)
    return _Comparison(
        expected=float(expected),
        found=float(found.loss),
        right=_close(captured, found.loss, expected) if torch.equal(found.random_state, after) else model_draws,
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


def _loss_of(objective: Objective, example: Mapping[str, Tensor], autocast: str | None) -> Tensor:
    with torch.no_grad(), casting(autocast):
        result: Tensor = objective(**{name: value.clone() for name, value in example.items()})
        return result


@contextlib.contextmanager
def _left_alone(objective: Objective) -> Iterator[None]:
    """Afterwards buffers, attributes and torch's random state are what they were."""
    held = PythonState(objective)
    kept = [(buffer, buffer.detach().clone()) for buffer in objective.buffers()]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        held.put_back()
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _run(captured: Captured, ops: Sequence[Op], example: Mapping[str, Tensor]) -> Trial:
    """What `ops`, all of the OP-DAG's or another form of them, give for `example`."""
    leaves = [op for op in ops if op.kind not in ("call", "loss")]
    calls = [op for op in ops if op.kind in ("call", "loss")]
    written = {target for op in calls for target in op.mutates}
    loss = captured.dag.loss.id
    interpreter = Interpreter(calls, [op.id for op in leaves], [loss], device=torch.device("cpu"))
    for op in leaves:
        value = example[op.target] if op.kind == "placeholder" else captured.tensors[op.target]
        interpreter.bind(op.id, value.clone() if op.id in written else value)
    values = interpreter.fresh()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        interpreter.run(values, 0, 0)
        return Trial(values[interpreter.slot[loss]], torch.get_rng_state())


def _close(captured: Captured, found: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding: torch may take another path to the same value."""
    half = any(meta.dtype in _HALF for op in captured.dag.ops for meta in op.outputs)
    tolerance = 2e-2 if half else 1e-4
    return torch.allclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance / 10, equal_nan=True)


def _folder_of(model: nn.Module) -> Path:
    """Where the model's class was written; the current folder for torch's own classes and for notebooks."""
    code = getattr(type(model).forward, "__code__", None)
    file = Path(code.co_filename) if code is not None else Path("-")
    return file.resolve().parent if file.is_file() and "site-packages" not in file.parts else Path.cwd()
