"""Runs `torch.export` on the objective, and turns its failures into errors that name the user's line."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.distributions import Distribution
from torch.export import ExportedProgram
from torch.nn.modules.batchnorm import _NormBase

from dag.capture.blame import causes, line_of_exception, module_of_exception, module_words, torch_functions
from dag.capture.carried import refused_seeding
from dag.capture.custom_gradients import refused
from dag.capture.example_words import example_words
from dag.capture.objective import Objective
from dag.capture.python_state import Attribute, PythonState
from dag.operators import torch_dtype
from dag.quiet import quiet
from fusion.errors import CaptureError

_NEEDS_A_VALUE = (
    r"data-dependent|DataDependent|_local_scalar_dense|\.item\(\)|Could not guard|unbacked|"
    r"bool\(\)|Tensor-likes are not|cannot be converted to a Python|__bool__|is_nonzero"
)
_ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"functorch tensor",
        "it is of torch.func (vmap, grad, jvp); write the computation over the batch, without it",
    ),
    (
        r"ctc_loss",
        "CTC loss takes lengths and labels by their values, and workers don't run it; use another loss",
    ),
    (
        r"nonzero|masked_select|unique|dynamic_output_shape|DynamicOutputShape|boolean index",
        "an operation's output shape depends on values (nonzero, masked_select, x[mask], unique); "
        "keep shapes fixed, for example with torch.where or by multiplying with the mask",
    ),
    (
        _NEEDS_A_VALUE,
        "Python needs a tensor's value here (if, while, .item(), int(), float() or bool() of a tensor); "
        "compute it with tensors, for example with torch.where",
    ),
    (
        r"cuda|CUDA",
        "forward moves something to a GPU; leave out .cuda() and .to(device): each worker puts its piece on its own device",
    ),
    (r"[Cc]omplex(Double|128|Half|32)", "complex numbers are supported as complex64 only, which comes of float32"),
    (
        r"fake tensor in the exported program|Generator|CUSTOM_OBJ",
        "forward does something that can't be traced (torch.autograd.grad, .backward(), .data, a torch.Generator, or "
        "tensors kept from an earlier call)",
    ),
    (
        r"inference mode|Inference tensors",
        "tensors made under torch.inference_mode() can't be trained; use torch.no_grad()",
    ),
)

_FUNCTIONS = {
    "gaussian_nll_loss": "it looks whether a variance is negative; write the loss out: "
    "(0.5 * (var.log() + (input - target) ** 2 / var)).mean(), with var clamped",
}
"""Functions of torch that look at values, and what to write in their place."""


def export(
    objective: Objective, example: Mapping[str, torch.Tensor], autocast: str | None = None
) -> tuple[ExportedProgram, list[Attribute]]:
    """Trace `objective` on `example`: non-strict first, then strict. Raises `CaptureError`.

    Under `autocast` the traced code sees the dtypes that it will see in training; the casts themselves are not in the
    graph, `dag.capture.autocast` adds them. With the program come the Python attributes that forward changed; they are put back.
    """
    # Each value is its own tensor: a tensor passed under two names would be traced as one input.
    device = next(objective.parameters()).device
    values = {key: value.detach().to(device, copy=True) for key, value in example.items()}
    held = PythonState(objective)
    changed: list[Attribute] = []

    def watch() -> Callable[[], None]:
        before = PythonState(objective)

        def finish() -> None:
            changed[:] = before.changes()

        return finish

    objective.watch = watch
    with quiet(), refused(), refused_seeding(), _unchecked(), casting(autocast), torch.random.fork_rng(devices=[]):
        try:
            return torch.export.export(objective, (), values, strict=False), changed
        except CaptureError as error:
            # Raised by us in the middle of the user's forward: say where.
            place = line_of_exception(error)
            raise CaptureError(f"{place}: {error}" if place else str(error)) from error
        except Exception as error:
            failure = error
        finally:
            # What tracing leaves there are tensors without data.
            held.put_back()
            objective.watch = None
        try:
            return torch.export.export(objective, (), values, strict=True), held.changes()
        except Exception:
            # The first error speaks of the user's own lines; strict mode's speaks of bytecode.
            raise _explained(failure, objective.model, example) from failure
        finally:
            held.put_back()


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Within it, distributions don't look at their arguments' values, which tracing has not; all else is the same."""
    checking = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checking)


def casting(autocast: str | None) -> contextlib.AbstractContextManager[object]:
    """Torch's autocast to that dtype, if any."""
    return torch.autocast("cpu", torch_dtype(autocast or "bfloat16"), enabled=autocast is not None, cache_enabled=False)


def _explained(error: Exception, model: nn.Module, example: Mapping[str, torch.Tensor]) -> CaptureError:
    ours = next((each for each in causes(error) if isinstance(each, CaptureError)), None)
    if ours is not None:
        return ours
    text, whole = _reason(error), f"{type(error).__name__} {error}"
    place, found = line_of_exception(error), module_of_exception(error, model)
    if found is not None:
        path, module = found
        name, why = module_words(path, _kind(module)), _why_of_module(module, whole)
        if why:
            return CaptureError(
                f"{place}: {name} can't be captured: {why}" if place else f"{name} can't be captured: {why}"
            )
        place = place or (name if path else "")
    prefix = f"{place}: " if place else ""
    for function in sorted(torch_functions(error) & _FUNCTIONS.keys()):
        return CaptureError(f"{prefix}{function} can't be captured: {_FUNCTIONS[function]}")
    for pattern, advice in _ADVICE:
        if re.search(pattern, whole):
            return CaptureError(f"{prefix}this model can't be captured: {advice} ({text})")
    return CaptureError(f"{prefix}this model can't be captured: {text} (a micro-batch has {example_words(example)})")


def _kind(module: nn.Module) -> str:
    """The class that a person wrote, also of a scripted module."""
    return str(getattr(module, "original_name", type(module).__name__))


def _why_of_module(module: nn.Module, error: str) -> str:
    """Why one of torch's own modules gave this error, and what to use in its place; "" where nothing is known."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is one of TorchScript, without its Python; use the module that it was made from"
    if isinstance(module, _NormBase) and module.momentum is None and re.search(_NEEDS_A_VALUE, error):
        return "with momentum=None it counts the batches in Python; give a momentum, for example 0.1"
    if isinstance(module, nn.RNNBase) and "must be tuple of ints,but got FakeTensor" in error:
        return (
            "it is given a packed sequence, whose shape depends on the lengths' values; give it the padded batch, and take what "
            "belongs to each sequence's last place with torch.gather or by a mask"
        )
    return ""


def _reason(error: Exception) -> str:
    """The first line of an exception, short enough for one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
