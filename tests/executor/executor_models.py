"""Models and batches for the executor's tests, and the plain PyTorch loop that they are held to."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from dag.capture import Captured, capture, with_evaluation
from dag.cut import cut_points
from dag.graph import OpDag

EXAMPLES = Path(__file__).parents[2] / "examples" / "models"


@cache
def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Case:
    """A model, its loss, and how to draw a micro-batch."""

    build: Callable[[], nn.Module]
    loss: Callable[..., Tensor]
    batch: Callable[[torch.Generator], dict[str, Tensor]]
    evaluation: bool = False
    """Whether evaluation is captured by itself."""

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().train()

    def batch_of(self, step: int, micro_batch: int) -> dict[str, Tensor]:
        return self.batch(torch.Generator().manual_seed(1000 * step + micro_batch + 10**6))

    def captured(self, autocast: str | None = None) -> Captured:
        model, example = self.model(), self.batch_of(0, 0)
        found = capture(model, example, self.loss, autocast=autocast)
        return with_evaluation(found, model, example, self.loss) if self.evaluation else found


def _tokens(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = torch.randint(0, 64, (2, 17), generator=generator)
    return {"inputs": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}


def _gpt(**options: Any) -> Case:
    module = example("gpt")
    defaults = {"layers": 2, "width": 32, "heads": 2, "vocabulary": 64, "sequence_length": 16}
    return Case(lambda: module.build(**(defaults | options)), module.loss, _tokens)


def _images(channels: int, size: int, count: int) -> Callable[[torch.Generator], dict[str, Tensor]]:
    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "inputs": torch.randn(count, channels, size, size, generator=generator),
            "targets": torch.randint(0, 10, (count,), generator=generator),
        }

    return draw


def _masks(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "inputs": torch.randn(2, 1, 16, 16, generator=generator),
        "targets": torch.randint(0, 2, (2, 16, 16), generator=generator),
    }


def _sentences(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "inputs": torch.randint(0, 64, (4, 12), generator=generator),
        "targets": torch.randint(0, 4, (4,), generator=generator),
    }


class Tricky(nn.Module):
    """In-place writes, a running buffer that the output reads, a no_grad part, an unused and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.bias = nn.Parameter(torch.zeros(4, 8))
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(3))
        self.last = nn.Linear(8, 5)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.first(x))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        y = (x - self.mean) * self.scale + self.bias
        y = y.view(2, 2, 8).transpose(0, 1).reshape(4, 8)
        with torch.no_grad():
            gate = torch.sigmoid(self.frozen(y))
        y = torch.cat([y * gate, x + torch.cos(self.table)], dim=0)
        y.add_(1.0)
        a, b = y.chunk(2)
        return self.last(a.mul(2.0).add_(b) * self.scale)


class Filled(nn.Module):
    """Tensors that are made without a gradient and filled with values that have one: by slices, rows, views and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
        self.narrow = nn.Linear(8, 4)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.zeros_like(x)
        halves[:, :4] = torch.tanh(self.narrow(x))
        halves[:, 4:] = x[:, 4:]
        x = self.linears[0](halves)
        rows, state = torch.empty(4, 8), x[0]
        for step in range(4):
            state = torch.tanh(self.linears[1](x[step]) + state)
            rows[step] = state
        flat = torch.zeros(32)
        view = flat.view(4, 8)
        view.add_(self.linears[2](rows))
        whole = torch.empty(4, 8)
        whole[:] = self.linears[3](flat.view(4, 8).relu())
        again = whole.clone()
        again.copy_(self.linears[4](whole))
        kept = torch.zeros(4, 8)
        with torch.no_grad():
            kept[:, 1:] = again[:, 1:]
        return self.last(again + kept)


class TwoModes(nn.Module):
    """Does other things in evaluation than flags say: skips a branch, moves no codebook, has one head, scales, reads a table."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.gain = nn.Parameter(torch.full((8,), 1.5))
        self.early, self.last = nn.Linear(8, 5), nn.Linear(8, 5)
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("table", torch.linspace(0.5, 1.5, 8))
        self.register_buffer("ramp", torch.linspace(0.0, 2.0, 4)[:, None])

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        early = x
        for index, layer in enumerate(self.layers):
            rest = torch.tanh(layer(x))
            if self.training and index % 2:
                rest = rest * self.ramp
            x = x + rest
            if index == 1:
                early = self.early(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            x = x * self.gain
        else:
            x = x * self.gain.exp() + self.table
        x = self.last((x - self.mean).view(2, 2, 8).transpose(0, 1).reshape(4, 8))
        return (x, early) if self.training else x


def _of_both_heads(output: Tensor | tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    if isinstance(output, Tensor):
        return nn.functional.cross_entropy(output, targets)
    return nn.functional.cross_entropy(output[0], targets) + 0.3 * nn.functional.cross_entropy(output[1], targets)


class Rotary(nn.Module):
    """Attention whose queries and keys are turned as complex numbers, as in the first Llama's code; the turns are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(64, 16), nn.Linear(16, 64)
        self.layers = nn.ModuleList(nn.ModuleList((nn.Linear(16, 48), nn.Linear(16, 16))) for _ in range(2))
        angles = torch.outer(torch.arange(16.0), 100.0 ** -torch.linspace(0, 1, 4))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles)[:, None])

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns).flatten(3).type_as(x)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for inwards, outwards in self.layers:
            query, key, value = inwards(x).view(*x.shape[:2], 3, 2, 8).unbind(2)
            heads = [part.transpose(1, 2) for part in (self.turned(query), self.turned(key), value)]
            mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + outwards(mixed.transpose(1, 2).flatten(2))
        x = x + torch.fft.fft2(x, norm="ortho").real
        spectrum = torch.fft.rfft(x)
        return self.head(x + torch.fft.irfft(spectrum * spectrum.conj(), n=16))  # type: ignore[no-any-return]


def _of_tokens(output: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())


def _functions(generator: torch.Generator) -> dict[str, Tensor]:
    return {"inputs": torch.randn(2, 16, generator=generator), "targets": torch.randn(2, 16, generator=generator)}


def _vectors(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "inputs": torch.randn(4, 8, generator=generator),
        "targets": torch.randint(0, 5, (4,), generator=generator),
    }


def cases() -> dict[str, Case]:
    return {
        "gpt": _gpt(),
        "gpt-tied": _gpt(tied=True),
        "gpt-dropout": _gpt(dropout=0.1),
        "resnet": Case(lambda: example("resnet").build(channels=1, width=8), example("resnet").loss, _images(1, 8, 4)),
        "vit": Case(lambda: example("vit").build(layers=2, width=16, heads=2), example("vit").loss, _images(1, 8, 2)),
        "lstm": Case(lambda: example("lstm").build(vocabulary=64, width=16), example("lstm").loss, _sentences),
        "unet": Case(lambda: example("unet").build(width=4), example("unet").loss, _masks),
        "moe": Case(
            lambda: example("moe").build(layers=1, width=16, heads=2, vocabulary=64, sequence_length=16),
            example("moe").loss,
            _tokens,
        ),
        "tricky": Case(Tricky, nn.functional.cross_entropy, _vectors),
        "filled": Case(Filled, nn.functional.cross_entropy, _vectors),
        "rotary": Case(Rotary, _of_tokens, _tokens),
        "fourier": Case(
            lambda: example("fourier").build(layers=2, width=8, modes=5), example("fourier").loss, _functions
        ),
        "two-modes": Case(TwoModes, _of_both_heads, _vectors, evaluation=True),
    }


CASES = cases()


@cache
def captured(name: str, autocast: str | None = None) -> Captured:
    return CASES[name].captured(autocast)


def random_cuts(dag: OpDag, fragments: int, seed: int) -> list[int]:
    """Legal positions for at most `fragments` fragments."""
    positions = [point.position for point in cut_points(dag)]
    return sorted(random.Random(seed).sample(positions, min(fragments - 1, len(positions))))


def plain_loop(
    case: Case,
    *,
    steps: int,
    micro_batches: int,
    optimizer: Callable[[nn.Module], list[torch.optim.Optimizer]],
    clip_grad_norm: float | None = None,
    factor: Callable[[int], float] = lambda step: 1.0,
    autocast: bool = False,
) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """Losses, final state dict and gradient norms of plain PyTorch with accumulated micro-batches."""
    model = case.model()
    optimizers = optimizer(model)
    peaks = [[group["lr"] for group in one.param_groups] for one in optimizers]
    losses, norms = [], []
    for step in range(1, steps + 1):
        total = 0.0
        for micro_batch in range(micro_batches):
            batch = case.batch_of(step, micro_batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = case.loss(model(batch["inputs"]), batch["targets"])
            (loss / micro_batches).backward()
            total += loss.item()
        if clip_grad_norm is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)))
        for one, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(one.param_groups, rates, strict=True):
                group["lr"] = rate * factor(step)
            one.step()
            one.zero_grad()
        losses.append(total / micro_batches)
    return losses, dict(model.state_dict()), norms


def evaluations_of(
    case: Case,
    steps: int,
    micro_batches: int,
    every: int,
    batches: int,
    optimizer: Callable[[nn.Module], list[torch.optim.Optimizer]],
) -> dict[int, float]:
    """By step, the mean loss after `model.eval()` of plain PyTorch."""
    model = case.model()
    optimizers = optimizer(model)
    found = {}
    for step in range(1, steps + 1):
        for micro_batch in range(micro_batches):
            batch = case.batch_of(step, micro_batch)
            (case.loss(model(batch["inputs"]), batch["targets"]) / micro_batches).backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
        if step % every == 0:
            model.eval()
            total = 0.0
            with torch.no_grad():
                for index in range(batches):
                    batch = case.batch_of(-step, index)
                    total += case.loss(model(batch["inputs"]), batch["targets"]).item()
            found[step] = total / batches
            model.train()
    return found


def mapping_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}
