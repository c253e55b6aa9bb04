"""Errors of the computation in words for a person."""

from __future__ import annotations

import torch

from fusion.errors import FusionError


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether the machine or its GPU had no more to give."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain(error: BaseException) -> str:
    """One line for a person."""
    text = " ".join(str(error).split())
    if isinstance(error, FusionError):
        return text
    if ran_out_of_memory(error):
        return (
            "the machine ran out of memory; use more workers, a smaller micro_batch, or train.recompute: true "
            f"({type(error).__name__})"
        )
    return f"{type(error).__name__}: {text[:500]}"
