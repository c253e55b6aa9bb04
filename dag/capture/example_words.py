"""What goes into a model, in words: for errors that speak of a dtype or a shape which the data has."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def example_words(example: Mapping[str, Tensor], *, ranges: bool = False) -> str:
    """`inputs float32 [4, 8], targets int64 [4]`; with `ranges`, what numbers the integers among them are."""
    return ", ".join(_words(name, value, ranges) for name, value in example.items())


def _words(name: str, value: Tensor, ranges: bool) -> str:
    found = f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if ranges and value.numel() and not value.is_floating_point() and not value.is_complex():
        found += f" from {int(value.min())} to {int(value.max())}"
    return found
