"""Refuses what changes or takes gradients behind the graph's back: custom autograd functions, hooks, `torch.autograd.grad`.

Tracing goes straight through them and would give a model that trains differently without a word.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fusion.errors import CaptureError

_ADVICE = "gradients come from torch's own operators only"
_TAKEN = "forward takes a gradient (torch.autograd.grad or backward), which can't be captured; write the derivative in torch functions"


def check_hooks(model: nn.Module) -> None:
    """Raise `CaptureError` when a parameter or module of `model` carries a backward hook."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise CaptureError(f"parameter {name} has a gradient hook, which can't be captured; {_ADVICE}")
    for name, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise CaptureError(f"module {name or type(module).__name__} has a backward hook; {_ADVICE}")


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Within it, applying a custom `torch.autograd.Function` to what has a gradient, hooking a tensor's gradient and taking one
    raise `CaptureError`.

    Reentrant checkpointing is one of them: traced, it would cut the gradient. Those that torch's control flow operators
    use pass here; `dag.capture.inline` refuses these operators.
    """
    apply, hook = torch.autograd.Function.__dict__["apply"], torch.Tensor.register_hook
    grad, backward = torch.autograd.grad, torch.Tensor.backward

    def checked_apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("torch._"):
            return apply.__get__(None, cls)(*args, **kwargs)
        if cls.__module__ == "torch.utils.checkpoint":
            raise CaptureError("reentrant checkpointing can't be captured; pass use_reentrant=False to checkpoint()")
        if not _wanted(args, kwargs):
            with torch.no_grad():  # As autograd runs its forward; what that takes from elsewhere gets no gradient.
                return apply.__get__(None, cls)(*args, **kwargs)
        raise CaptureError(
            f"{cls.__qualname__} is a custom torch.autograd.Function, which can't be captured; {_ADVICE}. A straight-through "
            "estimator of f is x + (f(x) - x).detach(), a reversed gradient 2 * x.detach() - x"
        )

    def checked_hook(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(f"forward hooks the gradient of a tensor, which can't be captured; {_ADVICE}")

    def checked_grad(*args: Any, **kwargs: Any) -> Any:
        # torch.func takes gradients that way; `dag.capture.inline` refuses what it leaves.
        if str(sys._getframe(1).f_globals.get("__name__", "")).startswith("torch."):
            return grad(*args, **kwargs)
        raise CaptureError(_TAKEN)

    def checked_backward(*_: Any, **__: Any) -> None:
        raise CaptureError(_TAKEN)

    torch.autograd.grad, torch.Tensor.backward = checked_grad, checked_backward  # type: ignore[method-assign]
    torch.autograd.Function.apply = classmethod(checked_apply)  # type: ignore[assignment]
    torch.Tensor.register_hook = checked_hook  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.grad, torch.Tensor.backward = grad, backward  # type: ignore[method-assign]
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        torch.Tensor.register_hook = hook  # type: ignore[method-assign]


def _wanted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a gradient may go back through a function of these arguments."""
    given = tree_leaves((args, kwargs))
    return torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in given)
