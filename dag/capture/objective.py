"""The module that is captured: the user's model and loss as one computation from data to a scalar."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dag.capture.blame import line_of_attribute, line_of_function
from fusion.errors import CaptureError

INPUTS = "inputs"
TARGETS = "targets"

Loss = str | Callable[..., Any]
_Buffer = tuple[nn.Module, str, torch.Tensor | None]


def cross_entropy(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy with the classes on the last axis of `output` [*targets.shape, C], or else torch's convention.

    Rows whose target is -100 don't count.
    """
    _check_classes(output, targets)
    if output.shape[:-1] == targets.shape:
        return nn.functional.cross_entropy(output.reshape(-1, output.shape[-1]), targets.reshape(-1))
    return nn.functional.cross_entropy(output, targets)


def _check_classes(output: torch.Tensor, targets: torch.Tensor) -> None:
    """Raise `CaptureError` for targets that are neither classes nor probabilities of them."""
    shapes = f"the model's output has shape {list(output.shape)} and the targets {list(targets.shape)}"
    if output.shape == targets.shape and output.dim() > 0:
        if not targets.is_floating_point():
            raise CaptureError(
                f"loss cross_entropy: {shapes}, of {_dtype(targets)}; probabilities of classes are floats: "
                "convert them, or give the number of the class alone"
            )
        return
    rows = {tuple(output.shape[:-1]), (*output.shape[:1], *output.shape[2:])} if output.dim() else set()
    if tuple(targets.shape) not in rows:
        advice = "; drop the targets' last axis" if tuple(targets.shape[:-1]) in rows and targets.shape[-1] == 1 else ""
        raise CaptureError(
            f"loss cross_entropy: {shapes}; it takes the number of a class for each row, of shape "
            f"{' or '.join(str(list(shape)) for shape in sorted(rows)) or '[]'}, or probabilities of the output's shape{advice}"
        )
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise CaptureError(
            f"loss cross_entropy: the targets are {_dtype(targets)}; classes are whole numbers from 0 on: convert them to int64"
        )


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def mse(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error; shapes must be equal, broadcasting is almost always a mistake here."""
    if output.shape != targets.shape:
        raise CaptureError(
            f"loss mse: the model's output has shape {list(output.shape)} and the targets {list(targets.shape)}; "
            "make them equal"
        )
    return nn.functional.mse_loss(output, targets)


BUILT_IN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
}


class Objective(nn.Module):
    """`forward(**example)` gives the loss. The model's parameters appear under `model.`, a loss module's under `loss.`."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        """Raises `CaptureError` for an unknown loss name."""
        super().__init__()
        if isinstance(loss, str) and loss not in BUILT_IN and loss != "model":
            raise CaptureError(
                f'loss {loss!r} is not known; use {", ".join(BUILT_IN)}, "model" when forward returns the loss, '
                "or a function of (output, targets)"
            )
        self.model = model
        self.from_model = loss == "model"
        self.loss = BUILT_IN[loss] if isinstance(loss, str) and loss in BUILT_IN else loss
        self.watch: Callable[[], Callable[[], None]] | None = None
        """Called before model and loss; what it returns, after them. Tracing leaves another state than they did."""

    def forward(self, **example: torch.Tensor) -> torch.Tensor:
        before, of_loss = _buffers_of(self.model), _buffers_of(self.loss)
        finish = self.watch() if self.watch is not None else None
        loss = self._loss(**example)
        self._write_back(before)
        _refuse_assigned(of_loss)
        if finish is not None:
            finish()
        if not isinstance(loss, torch.Tensor):
            raise CaptureError(f"the loss is of type {type(loss).__name__}; it must be a tensor with one value")
        if loss.dim() != 0:
            raise CaptureError(f"the loss has shape {list(loss.shape)}; it must be a scalar, return its mean or sum")
        if not loss.is_floating_point():
            raise CaptureError(f"the loss is of dtype {loss.dtype}; it must be a floating-point scalar")
        return loss

    def _write_back(self, before: list[_Buffer]) -> None:
        """Write what forward assigned to a buffer (`self.mean = new`) into the buffer itself.

        Tracing loses such an assignment in modules below the top one.
        """
        for module, name, buffer in before:
            assigned = module._buffers.get(name)
            if assigned is buffer:
                continue
            if assigned is None or buffer is None:
                module._buffers[name] = buffer
                raise CaptureError(
                    f"{_placed(line_of_attribute(module, name))}forward "
                    f"{'gives a value to' if buffer is None else 'takes the value from'} buffer {name} of "
                    f"{type(module).__name__}, which {'is' if buffer is None else 'becomes'} None; "
                    "give it a tensor of its final shape and dtype in __init__, and write that in place"
                )
            if assigned.shape != buffer.shape or assigned.dtype != buffer.dtype:
                raise CaptureError(
                    f"forward changes buffer {name} of {type(module).__name__} from {buffer.dtype}{list(buffer.shape)} "
                    f"to {assigned.dtype}{list(assigned.shape)}; a buffer must keep its shape and dtype"
                )
            with torch.no_grad():
                buffer.copy_(assigned)
            module._buffers[name] = buffer

    def _loss(self, **example: torch.Tensor) -> Any:
        if self.from_model:
            return _loss_of(self._call(example))
        targets = example.pop(TARGETS)
        output = _output_of(self._call(example))
        assert callable(self.loss)
        name = next((name for name, function in BUILT_IN.items() if function is self.loss), None)
        if name is not None and not isinstance(output, torch.Tensor):
            raise CaptureError(
                f"loss {name}: the model's output is of type {type(output).__name__}, and this loss takes one tensor; "
                "give a function of (output, targets), or return the tensor alone"
            )
        return self.loss(output, targets)

    def _call(self, example: dict[str, torch.Tensor]) -> Any:
        positional = (example.pop(INPUTS),) if INPUTS in example else ()
        return self.model(*positional, **example)


def _buffers_of(part: Any) -> list[_Buffer]:
    modules = part.modules() if isinstance(part, nn.Module) else ()
    return [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]


def _refuse_assigned(before: list[_Buffer]) -> None:
    for module, name, buffer in before:
        if module._buffers.get(name) is not buffer:
            module._buffers[name] = buffer
            raise CaptureError(
                f"{_placed(line_of_attribute(module, name))}the loss assigns its buffer {name}; a loss can't keep state, "
                "move the buffer and what updates it into the model"
            )


def _output_of(result: Any) -> Any:
    """What the loss function gets: `logits` of a transformers output, else the model's result itself."""
    if not isinstance(result, torch.Tensor):
        logits = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
        if logits is not None:
            return logits
    return result


def _loss_of(result: Any) -> Any:
    """The loss in what a model returns under loss: model."""
    if isinstance(result, torch.Tensor):
        return result
    found = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
    if found is None and isinstance(result, tuple | list) and result:
        found = result[0]
    if found is None:
        raise CaptureError(
            f"loss: model, but forward returned a {type(result).__name__} without a loss; return the loss, or an object "
            "with .loss (transformers models need their labels argument among the data)"
        )
    return found


def check_example(model: nn.Module, example: Mapping[str, Any], loss: Loss) -> None:
    """Raise `CaptureError` when `example` can't be what `model.forward` and the loss take."""
    for key, value in example.items():
        if not isinstance(value, torch.Tensor):
            raise CaptureError(f"example {key!r} is of type {type(value).__name__}; it must be a tensor")
    if isinstance(model, type):
        raise CaptureError(f"the model is the class {model.__name__}; make one, {model.__name__}(...)")
    if not isinstance(model, nn.Module):
        raise CaptureError(f"the model is of type {type(model).__name__}; it must be a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("the model is one of TorchScript, without its Python; give the module that it was made from")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise CaptureError("the model is one that torch.compile made; give the module that it was made from")
    if isinstance(loss, type):
        raise CaptureError(f"the loss is the class {loss.__name__}; make one, {loss.__name__}()")
    if callable(loss):
        _check_loss(loss)
    if loss != "model" and TARGETS not in example:
        raise CaptureError(f"the data has no {TARGETS!r} for the loss; its keys are {', '.join(example) or 'none'}")
    keys = [key for key in example if loss == "model" or key != TARGETS]
    if type(model).forward is nn.Module.forward:
        raise CaptureError(f"{type(model).__name__} has no forward method")
    signature = inspect.signature(model.forward)
    where = f"{_placed(line_of_function(type(model).forward))}{type(model).__name__}.forward"
    try:
        signature.bind(*([None] if INPUTS in keys else []), **{key: None for key in keys if key != INPUTS})
    except TypeError as error:
        raise CaptureError(
            f"{where} can't be called with the data's keys ({', '.join(keys) or 'none'}): {error}; "
            "`inputs` is passed first, other keys by name"
        ) from None


def _check_loss(loss: Callable[..., Any]) -> None:
    function = loss.forward if isinstance(loss, nn.Module) else loss
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        place = _placed(line_of_function(getattr(function, "__func__", function)))
        raise CaptureError(
            f"{place}the loss is called as loss(output, targets), which it does not take: {error}"
        ) from None
    except ValueError:  # Written in C: what it takes can't be seen.
        return


def _placed(place: str) -> str:
    return f"{place}: " if place else ""
