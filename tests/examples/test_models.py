"""The example models learn in plain PyTorch: a few steps on one batch bring the loss down."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(path: str) -> ModuleType:
    name = f"example_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def tokens() -> tuple[Tensor, Tensor]:
    text = torch.randint(0, 64, (4, 17))
    return text[:, :-1], text[:, 1:]


def images(size: int, channels: int) -> tuple[Tensor, Tensor]:
    return torch.rand(6, channels, size, size), torch.randint(0, 10, (6,))


CASES = {
    "gpt": ("gpt", {"layers": 2, "width": 32, "sequence_length": 16}, tokens),
    "gpt-tied-dropout": (
        "gpt",
        {"layers": 2, "width": 32, "sequence_length": 16, "tied": True, "dropout": 0.1},
        tokens,
    ),
    "resnet18": ("resnet", {"channels": 1, "width": 8}, lambda: images(8, 1)),
    "resnet18-large-stem": ("resnet", {"width": 8, "small": False}, lambda: images(64, 3)),
    "resnet101": ("resnet", {"depth": 101, "width": 4}, lambda: images(32, 3)),
    "vit": ("vit", {"layers": 2, "width": 32}, lambda: images(8, 1)),
    "lstm": ("lstm", {"width": 32}, lambda: (torch.randint(0, 256, (6, 12)), torch.randint(0, 4, (6,)))),
    "lstm-bidirectional": (
        "lstm",
        {"width": 32, "bidirectional": True, "dropout": 0.1},
        lambda: (torch.randint(0, 256, (6, 12)), torch.randint(0, 4, (6,))),
    ),
    "unet": ("unet", {"width": 4}, lambda: (torch.rand(2, 1, 16, 16), torch.randint(0, 2, (2, 16, 16)))),
    "moe": ("moe", {"width": 32, "experts": 3}, tokens),
    "fourier": ("fourier", {"width": 8, "modes": 5}, lambda: (torch.rand(6, 16), torch.rand(6, 16))),
}


@pytest.mark.parametrize("case", CASES)
def test_a_few_steps_lower_the_loss(case: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, args, batch = CASES[case]
    module = load(f"models/{name}.py")
    model = module.build(**args)
    inputs, targets = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        value = module.loss(model(inputs), targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_tied_gpt_shares_one_tensor() -> None:
    model = load("models/gpt.py").build(tied=True)
    assert model.head.weight is model.token_embedding.weight


@pytest.mark.parametrize("name", ["gpt", "resnet", "vit", "lstm", "unet", "moe", "fourier"])
def test_defaults_build(name: str) -> None:
    assert sum(parameter.numel() for parameter in load(f"models/{name}.py").build().parameters()) > 10_000


@pytest.mark.parametrize(
    ("path", "args"),
    [
        ("resnet", {"depth": 50}),
        ("gpt", {"width": 10, "heads": 4}),
        ("vit", {"image_size": 9}),
        ("moe", {"active": 9}),
    ],
)
def test_impossible_arguments_are_refused(path: str, args: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"\d"):
        load(f"models/{path}.py").build(**args)


@pytest.mark.parametrize("size", [8, 32])
def test_digits(size: int) -> None:
    data = load("data/digits.py").dataset(size=size)
    image, label = data[0]
    assert len(data) == 1797
    assert image.shape == (1, size, size)
    assert image.dtype is torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    assert label.dtype is torch.int64
    assert label.item() == 0
