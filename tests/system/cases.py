"""The models that the keystone tests train: each as a job spec for us, and as a plain module and arrays for PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
Arrays = dict[str, NDArray[Any]]
SAMPLES = 48


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"plain_{name}", EXAMPLES / "models" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokens(vocabulary: int, length: int) -> Arrays:
    stream = np.random.default_rng(0).integers(0, vocabulary, (SAMPLES, length + 1))
    return {"inputs": stream[:, :-1].copy(), "targets": stream[:, 1:].copy()}


def labelled_tokens(vocabulary: int, length: int) -> Arrays:
    ids = np.random.default_rng(0).integers(0, vocabulary, (SAMPLES, length))
    return {"input_ids": ids, "labels": ids.copy()}


def images(channels: int, size: int, classes: int) -> Arrays:
    generator = np.random.default_rng(0)
    return {
        "inputs": generator.normal(size=(SAMPLES, channels, size, size)).astype(np.float32),
        "targets": generator.integers(0, classes, SAMPLES),
    }


def masks(size: int) -> Arrays:
    generator = np.random.default_rng(0)
    return {
        "inputs": generator.normal(size=(SAMPLES, 1, size, size)).astype(np.float32),
        "targets": generator.integers(0, 2, (SAMPLES, size, size)),
    }


def labelled_sequences(vocabulary: int, length: int, classes: int) -> Arrays:
    generator = np.random.default_rng(0)
    return {
        "inputs": generator.integers(0, vocabulary, (SAMPLES, length)),
        "targets": generator.integers(0, classes, SAMPLES),
    }


def functions(points: int) -> Arrays:
    values = np.random.default_rng(0).normal(size=(SAMPLES, points)).astype(np.float32)
    return {"inputs": values, "targets": np.roll(values, 1, axis=1)}


@dataclass(frozen=True)
class Case:
    name: str
    model: dict[str, Any]
    arrays: Arrays
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    loss_spec: Any
    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "adamw", "lr": 1e-3})
    clip: float | None = None
    random: bool = False
    """Draws random numbers in training, so it is compared across placements and not with plain PyTorch."""
    three_contributions: bool = False
    """Some value may have three or more gradient contributions that cross fragments: 1e-6 relative, not bits."""


def _own(name: str, file: str, args: dict[str, Any], arrays: Arrays, **options: Any) -> Case:
    module = _example(file)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        result: Tensor = module.loss(model(batch["inputs"]), batch["targets"])
        return result

    path = EXAMPLES / "models" / f"{file}.py"
    return Case(
        name=name,
        model={"entrypoint": f"{path}:build", "args": args},
        arrays=arrays,
        build=lambda: module.build(**args),
        loss=loss,
        loss_spec={"entrypoint": f"{path}:loss"},
        **options,
    )


def _transformers(name: str, kind: str, config: dict[str, Any], arrays: Arrays) -> Case:
    def build() -> nn.Module:
        import transformers

        # Dropout would make plain PyTorch incomparable; it has cases of its own.
        made = transformers.AutoConfig.for_model(kind, **config)
        auto = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
        model: nn.Module = auto.from_config(made)
        return model

    return Case(
        name=name,
        model={"hf": kind, "config": config},
        arrays=arrays,
        build=build,
        loss=lambda model, batch: model(**batch).loss,
        loss_spec="model",
    )


_GPT = {"layers": 3, "width": 32, "heads": 2, "vocabulary": 64, "sequence_length": 16}
_NO_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def all_cases() -> list[Case]:
    """Every model family that capture promises, small."""
    return [
        _own("gpt-untied", "gpt", {**_GPT, "tied": False}, tokens(64, 16), clip=1.0),
        _own("gpt-tied", "gpt", {**_GPT, "tied": True}, tokens(64, 16), clip=1.0),
        _own("gpt-dropout", "gpt", {**_GPT, "tied": True, "dropout": 0.1}, tokens(64, 16), random=True),
        _transformers(
            "hf-gpt2",
            "gpt2",
            {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 3, "n_head": 2, **_NO_GPT2_DROPOUT},
            labelled_tokens(64, 16),
        ),
        _transformers("hf-llama", "llama", _LLAMA, labelled_tokens(64, 16)),
        _transformers("hf-qwen2", "qwen2", {**_LLAMA, "tie_word_embeddings": True}, labelled_tokens(64, 16)),
        _transformers(
            "hf-bert",
            "bert",
            {
                "vocab_size": 64,
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "max_position_embeddings": 32,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            labelled_tokens(64, 16),
        ),
        _own(
            "resnet-18",
            "resnet",
            {"depth": 18, "channels": 1, "width": 8},
            images(1, 8, 10),
            optimizer={"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
        ),
        _own(
            "resnet-101",
            "resnet",
            {"depth": 101, "channels": 1, "width": 4},
            images(1, 8, 10),
            optimizer={"name": "sgd", "lr": 0.01, "momentum": 0.9},
        ),
        _own("vit", "vit", {"layers": 3, "width": 32, "heads": 2}, images(1, 8, 10), clip=0.5),
        _own("lstm", "lstm", {"vocabulary": 64, "width": 24, "layers": 2}, labelled_sequences(64, 16, 4)),
        _own("unet", "unet", {"width": 4, "levels": 3}, masks(16), optimizer={"name": "adam", "lr": 1e-3}),
        _own(
            "moe",
            "moe",
            {"layers": 2, "width": 32, "heads": 2, "experts": 4, "vocabulary": 64, "sequence_length": 16},
            tokens(64, 16),
        ),
        _own("fourier", "fourier", {"layers": 3, "width": 8, "modes": 6}, functions(16), clip=1.0),
    ]


def as_tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in arrays.items()}
