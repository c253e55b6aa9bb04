"""One forward pass of the user's model on the first real micro-batch, here, before a job goes anywhere.

Capture works without numbers, so an index beyond an embedding table or a class beyond the logits would only show in a
worker, far from the line that matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dag.objective import Objective
from fusion.errors import CaptureError, FusionError
from fusion.user_code import explain


def try_once(model: nn.Module, loss: str | Callable[..., Any], example: Mapping[str, Tensor]) -> None:
    """Compute the loss of `example`; the model's buffers and torch's random state are afterwards what they were.

    Raises `CaptureError` with the user's line and the range of the data when it fails.
    """
    kept = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            Objective(model, loss)(**{name: value.clone() for name, value in example.items()})
    except FusionError:
        raise
    except Exception as error:
        ranges = ", ".join(
            f"{name} from {int(value.min())} to {int(value.max())}"
            for name, value in example.items()
            if value.dtype == torch.int64 and value.numel()
        )
        told = f" (the first micro-batch has {ranges})" if ranges else ""
        raise CaptureError(
            f"the model fails on the first micro-batch: {explain(error, _folder_of(model))}{told}"
        ) from error
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in kept:
                    buffer.copy_(kept[name])


def _folder_of(model: nn.Module) -> Path:
    """Where the model's class was written; the current folder for torch's own classes and for notebooks."""
    code = getattr(type(model).forward, "__code__", None)
    file = Path(code.co_filename) if code is not None else Path("-")
    return file.resolve().parent if file.is_file() and "site-packages" not in file.parts else Path.cwd()
