"""Mixture-of-experts models of transformers: captured in their dense form, which gives what their own forms give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dag_cases import Case, assert_same_bits, interpret
from torch import nn

from dag.capture import capture
from dag.capture.modes import ready_for_training

transformers = pytest.importorskip("transformers")

_SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# With a gate beside the rise or not, with weights that lie the other way round, with biases, with another width of experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "nemotron_h": {
        "head_dim": 8,
        "layers_block_type": ["full_attention", "moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 8,
    },
}


def made(family: str, experts: str | None = None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **_SMALL, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=experts).train()
    ids = torch.randint(64, (2, 8))
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dense_form_gives_what_the_model_s_own_gives(family: str) -> None:
    model, example = made(family)
    before = model.config._experts_implementation
    found = capture(model, example, "model")
    assert model.config._experts_implementation == before == "grouped_mm"

    def dense(model: nn.Module) -> torch.Tensor:
        with ready_for_training(model):
            loss: torch.Tensor = model(**example).loss
            return loss

    assert_same_bits(found.dag, found.tensors, Case(model, example, "model", dense))
    own, _ = made(family, "eager")
    expected = own(**example).loss
    expected.backward()
    loss, leaves = interpret(found.dag, found.tensors, example)
    torch.testing.assert_close(loss, expected.detach())
    for name, parameter in own.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(leaves[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_form_that_the_config_asks_for_stays() -> None:
    model, example = made("mixtral", "batched_mm")
    found = capture(copy.deepcopy(model), example, "model")
    assert_same_bits(found.dag, found.tensors, Case(model, example, "model", lambda model: model(**example).loss))
