"""The user's model on the first real micro-batch, here, before a job goes anywhere.

Capture works without numbers, so an index beyond an embedding table or a class beyond the logits would only show in a
worker, far from the line that matters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dag.capture.blame import module_of_exception, module_words
from dag.capture.example_words import example_words
from dag.capture.export import casting
from dag.capture.modes import ready_for_training
from dag.capture.objective import TARGETS, Objective
from dag.capture.python_state import PythonState
from fusion.errors import CaptureError, FusionError
from fusion.user_code import explain


@dataclass(frozen=True)
class Trial:
    """What a micro-batch gave."""

    loss: Tensor
    random_state: Tensor
    """Torch's afterwards; it began with seed 0."""
    gradients: Mapping[str, Tensor | None] = field(default_factory=dict)
    """Of the parameters that were asked for, by name."""


def try_once(
    model: nn.Module,
    loss: str | Callable[..., Any],
    example: Mapping[str, Tensor],
    autocast: str | None = None,
    parameters: Sequence[str] = (),
    written: Sequence[Tensor] = (),
) -> Trial:
    """Try `example`, and backward for the gradients of `parameters`, where there are some; the model's buffers, gradients and
    attributes, what is `written_by` it, and torch's random state are afterwards what they were.

    Raises `CaptureError` with the user's line and the range of the data when it fails.
    """
    objective = Objective(model, loss)
    part = ""
    try:
        with ready_for_training(model), left_alone(objective, written):
            torch.manual_seed(0)
            with torch.set_grad_enabled(bool(parameters)):
                found = loss_of(objective, example, autocast)
            after, part = torch.get_rng_state(), " in backward"
            gradients = _gradients_of(found, model, parameters) if parameters else {}
            return Trial(found.detach(), after, gradients)
    except FusionError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the model fails{part} on the first micro-batch: {_placed(error, model)}"
            f"{_advice(error, example)} (the first micro-batch has {example_words(example, ranges=True)})"
        ) from error


def _gradients_of(loss: Tensor, model: nn.Module, parameters: Sequence[str]) -> dict[str, Tensor | None]:
    """By name; None where the loss does not depend on one."""
    named = dict(model.named_parameters(remove_duplicate=False))
    found = torch.autograd.grad(loss, [named[name] for name in parameters], allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def _placed(error: Exception, model: nn.Module) -> str:
    """With the line of the user's; a model that is made of torch's own modules alone has none, but a module."""
    told = explain(error, folder_of(model))
    found = module_of_exception(error, model) if told.startswith(type(error).__name__) else None
    return f"{module_words(found[0], type(found[1]).__name__)}: {told}" if found is not None else told


def _advice(error: Exception, example: Mapping[str, Tensor]) -> str:
    whole = [name for name, value in example.items() if name != TARGETS and not value.is_floating_point()]
    if whole and re.search(r"same dtype|expected scalar type", str(error)):
        return f"; whole numbers go in as such: make {' and '.join(whole)} floats in the data, or in forward"
    return ""


def loss_of(objective: Objective, example: Mapping[str, Tensor], autocast: str | None) -> Tensor:
    """Of a copy of `example`, with gradients where these are enabled."""
    with casting(autocast):
        result: Tensor = objective(**{name: value.clone() for name, value in example.items()})
        return result


@contextlib.contextmanager
def left_alone(objective: Objective, written: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards buffers, `written`, attributes and torch's random state are what they were."""
    held = PythonState(objective)
    kept = [(tensor, tensor.detach().clone()) for tensor in (*objective.buffers(), *written)]
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        held.put_back()
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


def folder_of(model: nn.Module) -> Path:
    """Where the model's class was written; the current folder for torch's own classes and for notebooks."""
    code = getattr(type(model).forward, "__code__", None)
    file = Path(code.co_filename) if code is not None else Path("-")
    return file.resolve().parent if file.is_file() and "site-packages" not in file.parts else Path.cwd()
