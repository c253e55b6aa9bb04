"""The two modes that a model is traced and tried in: `train()` and `eval()`, without what only generation and inference want."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dag.capture.experts import dense_experts
from dag.capture.objective import Objective


@contextlib.contextmanager
def ready_for_training(model: nn.Module) -> Iterator[None]:
    """In training mode, and, for transformers, with dense experts and without the cache that only generation needs."""
    was_training = model.training
    if not was_training:
        model.train()
    try:
        with _plain(model):
            yield
    finally:
        if not was_training:
            model.eval()


@contextlib.contextmanager
def in_evaluation(objective: Objective) -> Iterator[None]:
    """As after `model.eval()`, the loss included; afterwards each module's mode is what it was."""
    modes, training = [(module, module.training) for module in objective.modules()], objective.model.training
    # Torch's attention layers have a path for evaluation that gives zeros at places that are masked.
    fast: bool = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    objective.eval()
    try:
        with _plain(objective.model):
            yield
    finally:
        # Some have more to undo than a flag: layers of LoRA add to their weights in `eval()` what `train()` takes out again.
        objective.train(training)
        for module, mode in modes:
            module.training = mode
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    config: Any = getattr(model, "config", None)
    caching = getattr(config, "use_cache", None) is True
    if caching:
        config.use_cache = False
    try:
        with dense_experts(model):
            yield
    finally:
        if caching:
            config.use_cache = True
