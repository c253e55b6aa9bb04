"""Errors of the computation in words for a person."""

from __future__ import annotations

import torch

from fusion.errors import FusionError


def explain(error: BaseException) -> str:
    """One line for a person."""
    text = " ".join(str(error).split())
    if isinstance(error, FusionError):
        return text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return (
            "the machine ran out of memory; use more workers, a smaller micro_batch, or train.recompute: true "
            f"({type(error).__name__})"
        )
    return f"{type(error).__name__}: {text[:500]}"
