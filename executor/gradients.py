"""Gradients at a fragment's borders: adding what arrives in a fixed order, and owning what stays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def add_in_order(contributions: Sequence[Tensor]) -> Tensor | None:
    """The sum of the contributions from left to right, None of none. Changes none of them."""
    total: Tensor | None = None
    for contribution in contributions:
        total = contribution if total is None else total + contribution
    return total


def own_gradients(parameters: Sequence[Tensor], foreign: Iterable[Tensor]) -> None:
    """Give every parameter whose `.grad` shares memory with one of `foreign` a gradient of its own.

    Autograd hands a gradient through views and additions as it is, so a parameter's first `.grad` may be the memory of
    a message that came in or goes out; the next micro-batch would add to it there.
    """
    taken = {tensor.untyped_storage().data_ptr() for tensor in foreign}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.untyped_storage().data_ptr() in taken:
            parameter.grad = gradient.clone()
