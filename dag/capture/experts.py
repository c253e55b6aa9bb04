"""Mixture-of-experts layers of transformers in a form that can be captured: every expert sees every token.

Their own form multiplies groups of tokens whose sizes depend on values, by an operator that is not torch's. In this one the
experts that the router has not chosen have weight zero. It costs as many times more as there are experts for each chosen
one, and gives the same but for rounding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "fusion_dense"
_GROUPED = "grouped_mm"


@contextlib.contextmanager
def dense_experts(model: nn.Module) -> Iterator[None]:
    """Within it, what would be multiplied in groups is dense; another form that a config asks for stays."""
    moe: Any = sys.modules.get("transformers.integrations.moe")
    configs: dict[int, Any] = {
        id(config): config
        for module in model.modules()
        if moe is not None
        and getattr(config := getattr(module, "config", None), "_experts_implementation", None) == _GROUPED
    }
    if configs:
        moe.ALL_EXPERTS_FUNCTIONS.register(_NAME, _forward)
    for config in configs.values():
        config._experts_implementation = _NAME
    try:
        yield
    finally:
        for config in configs.values():
            config._experts_implementation = _GROUPED


def _forward(layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Tokens (token, width), with the experts chosen for each and their weights, both (token, choice)."""

    def project(name: str, arriving: Tensor) -> Tensor:
        weight = getattr(layer, name)
        result = torch.bmm(arriving, weight if layer.is_transposed else weight.transpose(1, 2))
        return result + getattr(layer, f"{name}_bias").unsqueeze(1) if layer.has_bias else result

    tokens, width = hidden_states.shape
    arriving = hidden_states.expand(layer.num_experts, tokens, width)
    if layer.has_gate:
        risen = layer._apply_gate(project("gate_up_proj", arriving))
    else:
        risen = layer.act_fn(project("up_proj", arriving))
    result = project("down_proj", risen)
    if layer.has_post_expert_norm:
        result = layer.post_expert_norm(result)
    weights = top_k_weights.new_zeros(tokens, layer.num_experts).scatter(1, top_k_index, top_k_weights)
    return (result * weights.t().unsqueeze(-1)).sum(0).to(hidden_states.dtype)
