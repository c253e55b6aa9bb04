"""The model families that capture is tested on, small, and an interpreter that runs a whole OP-DAG."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dag.capture import Captured, capture
from dag.capture.objective import Loss
from dag.graph import OpDag
from dag.operators import run

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[2] / "examples" / "models"


@dataclass(frozen=True)
class Case:
    """A model with one micro-batch; `eager` computes its loss without anything of ours."""

    model: nn.Module
    example: dict[str, Tensor]
    loss: Loss
    eager: Callable[[nn.Module], Tensor]


def example_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"dag_example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # strict tracing imports the module that it reads
    spec.loader.exec_module(module)
    return module


def _own(name: str, inputs: Tensor, targets: Tensor, **args: Any) -> Case:
    module = example_module(name)
    return Case(
        module.build(**args),
        {"inputs": inputs, "targets": targets},
        module.loss,
        lambda model: module.loss(model(inputs), targets),  # type: ignore[no-any-return]
    )


def tokens(vocabulary: int = 256) -> Tensor:
    return torch.randint(vocabulary, (2, 16))


def _transformers(config: str, model: str, *, mask: bool = False, **options: Any) -> Case:
    import transformers

    made = getattr(transformers, model)(getattr(transformers, config)(vocab_size=96, **options))
    made.train()
    ids = tokens(96)
    example = {"input_ids": ids, "labels": ids}
    if mask:
        example["attention_mask"] = (torch.arange(16) < torch.tensor([[16], [10]])).long()
    return Case(
        made, example, "model", lambda model: model(**{key: value.clone() for key, value in example.items()}).loss
    )


_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 1}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
_SMALL_GPT = {"layers": 2, "width": 32, "sequence_length": 16}

CASES: dict[str, Callable[[], Case]] = {
    "gpt": lambda: _own("gpt", tokens(), tokens(), **_SMALL_GPT),
    "gpt tied": lambda: _own("gpt", tokens(), tokens(), tied=True, **_SMALL_GPT),
    "gpt dropout": lambda: _own("gpt", tokens(), tokens(), dropout=0.1, **_SMALL_GPT),
    "resnet18": lambda: _own("resnet", torch.randn(2, 3, 16, 16), torch.tensor([1, 2]), depth=18, width=8),
    "resnet101": lambda: _own("resnet", torch.randn(2, 3, 16, 16), torch.tensor([1, 2]), depth=101, width=4),
    "vit": lambda: _own("vit", torch.randn(2, 1, 8, 8), torch.tensor([1, 2])),
    "lstm": lambda: _own("lstm", tokens(), torch.tensor([1, 2]), width=16),
    "lstm dropout": lambda: _own("lstm", tokens(), torch.tensor([1, 2]), width=16, dropout=0.2, bidirectional=True),
    "unet": lambda: _own("unet", torch.randn(2, 1, 16, 16), torch.randint(2, (2, 16, 16)), width=4),
    "moe": lambda: _own("moe", tokens(), tokens(), width=16),
    "fourier": lambda: _own("fourier", torch.randn(2, 16), torch.randn(2, 16), width=8, modes=5),
    "hf gpt2": lambda: _transformers("GPT2Config", "GPT2LMHeadModel", **_GPT2),
    "hf llama": lambda: _transformers("LlamaConfig", "LlamaForCausalLM", **_LLAMA),
    "hf qwen2": lambda: _transformers("Qwen2Config", "Qwen2ForCausalLM", **_LLAMA),
    "hf bert": lambda: _transformers("BertConfig", "BertForMaskedLM", mask=True, **_BERT),
}


@cache
def captured(name: str) -> tuple[Case, Captured]:
    """A case and its capture, made once per test process; don't change the model."""
    torch.manual_seed(0)
    case = CASES[name]()
    return case, capture(case.model, case.example, case.loss)


def interpret(
    dag: OpDag, tensors: Mapping[str, Tensor], example: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the whole DAG forward and backward; gives the loss, and the leaves with their gradients or new values."""
    values: dict[int, Any] = {}
    leaves: dict[str, Tensor] = {}
    for op in dag.ops:
        if op.kind == "placeholder":
            values[op.id] = example[op.target].clone()
        elif op.kind in ("call", "loss"):
            values[op.id] = run(op, values, CPU)
        else:
            leaf = tensors[op.target].detach().clone()
            values[op.id] = leaves[op.target] = leaf.requires_grad_() if op.kind == "parameter" else leaf
    loss = values[dag.loss.id]
    loss.backward()
    return loss.detach(), leaves


def assert_same_bits(
    dag: OpDag, tensors: Mapping[str, Tensor], case: Case, eager: Callable[[nn.Module], Tensor] | None = None
) -> None:
    """Loss, gradients and buffers of the interpreted DAG equal the eager model's, bit for bit."""
    import copy

    model = copy.deepcopy(case.model)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.manual_seed(7)
    loss, leaves = interpret(dag, tensors, case.example)
    torch.manual_seed(7)
    expected = (eager or case.eager)(model)
    expected.backward()
    assert torch.equal(loss, expected.detach()), f"{loss} is not {expected}"
    parameters = dict(model.named_parameters())
    assert {parameter.name for parameter in dag.parameters} == {
        name for name, parameter in parameters.items() if parameter.grad is not None
    }
    for parameter in dag.parameters:
        gradient = leaves[parameter.name].grad
        wanted = parameters[parameter.name].grad
        assert gradient is not None
        assert wanted is not None
        assert torch.equal(gradient, wanted), f"{parameter.name} differs by {(gradient - wanted).abs().max()}"
    for name, buffer in model.named_buffers():
        if name in leaves:
            assert torch.equal(leaves[name], buffer), name
