"""Random models that branch on `self.training` anywhere: training and evaluation are plain PyTorch's, wherever they are cut.

`FUSION_PROGRAMS=1000` tries more of them.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from executor_models import Case, evaluations_of, plain_loop, random_cuts
from executor_pipeline import Pipeline, Settings, differing
from torch import Tensor, nn

from dag.cut import cut_points

PROGRAMS = int(os.environ.get("FUSION_PROGRAMS", "8"))
KINDS = (
    "linear",
    "linear",
    "add",
    "gain",
    "moving",
    "read",
    "view",
    "in place",
    "slice",
    "halves",
    "table",
    "scale",
    "norm",
    "batch norm",
)


@dataclass(frozen=True)
class Step:
    """One line of forward: it reads values `first` and `second` of those made so far."""

    kind: str
    first: int
    second: int
    number: int


@dataclass(frozen=True)
class Line:
    where: Literal["both", "training", "evaluation"]
    training: Step
    evaluation: Step


class Program(nn.Module):
    """Lines that are in both modes, in one of them, or read other values in the other; shared weights and moving buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.gains = nn.ParameterList(torch.rand(8) + 0.5 for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(2))
        self.register_buffer("mean", torch.rand(8))
        self.last = nn.Linear(8, 5)
        self.lines = [self._line(chance, made) for made in range(1, chance.randint(5, 15))]

    def _line(self, chance: random.Random, made: int) -> Line:
        kind = chance.choice(KINDS)
        steps = [Step(kind, chance.randrange(made), chance.randrange(made), chance.randrange(12)) for _ in range(2)]
        where = chance.choice(("both", "both", "both", "training", "evaluation", "other values"))
        if where == "other values":
            return Line("both", steps[0], steps[1])
        return Line(where, steps[0], steps[0])  # type: ignore[arg-type]

    def _run(self, step: Step, values: list[Tensor]) -> Tensor:
        x, other = values[step.first], values[step.second]
        match step.kind:
            case "linear":
                return torch.tanh(self.linears[step.number % 4](x))
            case "add":
                return x + other
            case "gain":
                return x * self.gains[step.number % 3]
            case "moving":
                if self.training:
                    with torch.no_grad():
                        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                return x - self.mean
            case "read":
                return x + self.mean
            case "view":
                return x.view(2, 2, 8).transpose(0, 1).reshape(4, 8)
            case "in place":
                return x.clone().add_(other).mul_(0.5)
            case "slice":
                y = x * 1.5
                y[:, step.number % 4 : 6] = other[:, step.number % 4 : 6]
                return y
            case "halves":
                left, right = x.chunk(2, -1)
                return torch.cat([right, left], -1)
            case "table":
                return x + torch.linspace(0, 1, 8) * (step.number % 3)
            case "scale":
                return x * (1 + 0.1 * step.number)
            case "norm":
                return nn.functional.layer_norm(x, (8,), self.gains[step.number % 3])
            case _:
                result: Tensor = self.norms[step.number % 2](x)
                return result

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for line in self.lines:
            here = line.training if self.training else line.evaluation
            skipped = line.where not in ("both", "training" if self.training else "evaluation")
            values.append(values[here.first] if skipped else self._run(here, values))
        # Everything is trained, whatever the lines leave out.
        y = values[-1] + self.mean
        for module in (*self.linears, *self.norms):
            y = y + 0.01 * module(x)
        for gain in self.gains:
            y = y * gain
        return self.last(y)  # type: ignore[no-any-return]


def vectors(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "inputs": torch.randn(4, 8, generator=generator),
        "targets": torch.randint(0, 5, (4,), generator=generator),
    }


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-2)]


class MoreInEvaluation(nn.Module):
    """Evaluation has a table, and ops of its own before what is random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 5)
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if not self.training:
            x = torch.sigmoid(x) * self.table + torch.rand_like(x)
        x = nn.functional.dropout(x, 0.5, self.training)
        return self.last(x + torch.randn_like(x))  # type: ignore[no-any-return]


def test_training_draws_the_numbers_that_it_draws_alone() -> None:
    settings = Settings(steps=2, micro_batches=2)
    results = []
    for evaluation in (False, True):
        case = Case(MoreInEvaluation, nn.functional.cross_entropy, vectors, evaluation=evaluation)
        made = case.captured()
        results.append(Pipeline(made.dag, made.tensors, [], settings).run(case.batch_of))
        assert len(set(made.dag.numbers)) == len(made.dag.ops)
    alone, both = results
    assert both.losses == alone.losses
    assert all(torch.equal(both.state[name], value) for name, value in alone.state.items())


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_a_random_model(seed: int) -> None:
    case = Case(lambda: Program(seed), nn.functional.cross_entropy, vectors, evaluation=True)
    made = case.captured()
    expected = evaluations_of(case, 2, 2, 1, 2, adamw)
    losses, state, _ = plain_loop(case, steps=2, micro_batches=2, optimizer=adamw)
    settings = Settings(steps=2, micro_batches=2, eval_every=1, eval_batches=2)
    everywhere = [point.position for point in cut_points(made.dag)]
    for cuts in ([], everywhere, random_cuts(made.dag, 4, seed)):
        outcome = Pipeline(made.dag, made.tensors, cuts, settings, shuffle=seed).run(case.batch_of)
        assert outcome.evaluations == expected
        assert outcome.losses == losses
        assert differing(outcome, state) == []
