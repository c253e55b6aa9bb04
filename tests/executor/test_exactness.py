"""Cut anywhere, placed anywhere, delivered in any order: the bits of a plain PyTorch loop."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from executor_models import CASES, captured, evaluations_of, plain_loop, random_cuts
from executor_pipeline import Outcome, Pipeline, Settings, differing, same
from torch import nn

from dag.cut import cut_points
from executor.learning_rate import factor
from fusion.spec import LrScheduleSpec, OptimizerSpec

EXACT = [name for name in CASES if "dropout" not in name]


def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-2)]


def run(name: str, fragments: int, seed: int, settings: Settings, autocast: str | None = None) -> Outcome:
    """Cut at random legal positions, place on up to three workers, deliver in a random order."""
    made = captured(name, autocast)
    chance = random.Random(seed)
    cuts = random_cuts(made.dag, fragments, seed)
    placement = [chance.randrange(3) for _ in range(len(cuts) + 1)]
    pipeline = Pipeline(made.dag, made.tensors, cuts, settings, placement=placement, shuffle=seed)
    return pipeline.run(CASES[name].batch_of)


@pytest.mark.parametrize("name", EXACT)
def test_losses_norms_weights_and_buffers_are_plain_pytorchs(name: str) -> None:
    losses, state, norms = plain_loop(CASES[name], steps=3, micro_batches=4, optimizer=adamw, clip_grad_norm=0.5)
    for seed, (fragments, schedule, recompute) in enumerate(
        [(1, "1f1b", False), (2, "gpipe", False), (4, "1f1b", True), (6, "1f1b", False)]
    ):
        settings = Settings(schedule=schedule, recompute=recompute, clip_grad_norm=0.5)
        outcome = run(name, fragments, seed, settings)
        assert outcome.losses == losses
        assert outcome.norms == norms
        assert differing(outcome, state) == []


@pytest.mark.parametrize("name", ["tricky", "filled", "two-modes", "fourier"])
def test_fragments_of_one_op_each_and_two_fragments_wherever_they_may_be_cut(name: str) -> None:
    made = captured(name)
    losses, state, _ = plain_loop(CASES[name], steps=2, micro_batches=3, optimizer=adamw)
    everywhere = [point.position for point in cut_points(made.dag)]
    for cuts in (everywhere, *([position] for position in everywhere)):
        pipeline = Pipeline(made.dag, made.tensors, cuts, Settings(steps=2, micro_batches=3))
        outcome = pipeline.run(CASES[name].batch_of)
        assert outcome.losses == losses
        assert differing(outcome, state) == []


def test_dropout_draws_the_same_numbers_wherever_it_is_cut_and_when_recomputed() -> None:
    outcomes = [
        run("gpt-dropout", fragments, seed, Settings(schedule=schedule, recompute=recompute))
        for seed, (fragments, schedule, recompute) in enumerate(
            [(1, "1f1b", False), (3, "gpipe", False), (5, "1f1b", True)]
        )
    ]
    assert len({tuple(outcome.losses) for outcome in outcomes}) == 1
    for outcome in outcomes[1:]:
        assert all(same(value, outcomes[0].state[key]) for key, value in outcome.state.items())
    other = run("gpt-dropout", 1, 0, Settings(seed=8))
    assert other.losses != outcomes[0].losses


def torch_optimizers() -> dict[str, tuple[OptimizerSpec, Callable[[nn.Module], list[torch.optim.Optimizer]]]]:
    def split(model: nn.Module) -> list[torch.optim.Optimizer]:
        matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        others = [parameter for parameter in model.parameters() if parameter.ndim != 2]
        return [torch.optim.Muon(matrices, lr=1e-2, momentum=0.9), torch.optim.AdamW(others, lr=1e-2)]

    o = torch.optim
    return {
        "sgd": (OptimizerSpec(name="sgd", lr=0.1), lambda m: [o.SGD(m.parameters(), lr=0.1)]),
        "sgd-momentum": (
            OptimizerSpec(name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
            lambda m: [o.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)],
        ),
        "adam": (
            OptimizerSpec(name="adam", lr=1e-2, betas=(0.8, 0.9), eps=1e-6),
            lambda m: [o.Adam(m.parameters(), lr=1e-2, betas=(0.8, 0.9), eps=1e-6)],
        ),
        "adamw": (
            OptimizerSpec(name="adamw", lr=1e-2, weight_decay=0.1),
            lambda m: [o.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1)],
        ),
        "adagrad": (
            OptimizerSpec(name="adagrad", lr=1e-2, lr_decay=0.1),
            lambda m: [o.Adagrad(m.parameters(), lr=1e-2, lr_decay=0.1)],
        ),
        "muon": (OptimizerSpec(name="muon", lr=1e-2, momentum=0.9), split),
    }


@pytest.mark.parametrize("optimizer", torch_optimizers())
def test_every_optimizer_with_a_schedule(optimizer: str) -> None:
    spec, build = torch_optimizers()[optimizer]
    schedule = LrScheduleSpec(name="cosine", warmup=2, final=0.1)
    losses, state, _ = plain_loop(
        CASES["gpt-tied"], steps=4, micro_batches=2, optimizer=build, factor=lambda step: factor(schedule, step, 4)
    )
    outcome = run("gpt-tied", 4, 5, Settings(steps=4, micro_batches=2, optimizer=spec, lr_schedule=schedule))
    assert outcome.losses == losses
    assert differing(outcome, state) == []


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "adamw", "adagrad", "muon"])
def test_resuming_from_a_state_continues_with_the_same_bits(optimizer: str) -> None:
    spec, _ = torch_optimizers()[optimizer]
    settings = Settings(steps=5, micro_batches=2, optimizer=spec, clip_grad_norm=1.0)
    name = "resnet" if optimizer == "sgd-momentum" else "gpt-tied"
    made = captured(name)
    whole = Pipeline(made.dag, made.tensors, random_cuts(made.dag, 3, 1), settings)
    expected = whole.run(CASES[name].batch_of, snapshot_at=[2])
    # Another cut, and initial weights that are not those of the start.
    zeros = {key: torch.zeros_like(value) for key, value in made.tensors.items()}
    zeros |= {
        op.target: made.tensors[op.target] for op in made.dag.ops if op.id in made.dag.constant and op.target in zeros
    }
    resumed = Pipeline(
        made.dag, zeros, random_cuts(made.dag, 4, 2), settings, first_step=3, resume=expected.snapshots[2]
    ).run(CASES[name].batch_of)
    assert resumed.losses == expected.losses[2:]
    assert resumed.state.keys() == expected.state.keys()
    assert all(same(value, expected.state[key]) for key, value in resumed.state.items())


@pytest.mark.parametrize("name", ["gpt-tied", "vit", "rotary", "fourier"])
def test_bfloat16_autocast(name: str) -> None:
    losses, state, norms = plain_loop(
        CASES[name], steps=3, micro_batches=2, optimizer=adamw, clip_grad_norm=0.5, autocast=True
    )
    for seed, fragments in enumerate([1, 3, 5]):
        outcome = run(name, fragments, seed, Settings(micro_batches=2, clip_grad_norm=0.5), autocast="bfloat16")
        assert outcome.losses == losses
        assert outcome.norms == norms
        assert differing(outcome, state) == []


def plain_evaluations(name: str, steps: int, micro_batches: int, every: int, batches: int) -> dict[int, float]:
    return evaluations_of(CASES[name], steps, micro_batches, every, batches, adamw)


@pytest.mark.parametrize("name", ["gpt-tied", "resnet", "unet", "lstm", "two-modes"])
def test_evaluation_is_plain_pytorchs_and_changes_nothing(name: str) -> None:
    settings = Settings(steps=4, micro_batches=2, eval_every=2, eval_batches=3)
    outcome = run(name, 4, 3, settings)
    assert outcome.evaluations == plain_evaluations(name, 4, 2, 2, 3)
    assert outcome.losses == run(name, 4, 3, Settings(steps=4, micro_batches=2)).losses


def test_evaluation_that_is_another_computation_wherever_it_is_cut() -> None:
    made = captured("two-modes")
    expected = plain_evaluations("two-modes", 2, 2, 1, 2)
    everywhere = [point.position for point in cut_points(made.dag)]
    settings = Settings(steps=2, micro_batches=2, eval_every=1, eval_batches=2)
    assert len(everywhere) > 15
    for cuts in (everywhere, *([position] for position in everywhere)):
        pipeline = Pipeline(made.dag, made.tensors, cuts, settings)
        assert pipeline.run(CASES["two-modes"].batch_of).evaluations == expected


def test_evaluation_turns_dropout_off() -> None:
    settings = Settings(steps=1, micro_batches=1, eval_every=1, eval_batches=1)
    with_dropout = run(
        "gpt-dropout", 3, 1, Settings(**(vars(settings) | {"optimizer": OptimizerSpec(name="sgd", lr=1e-12)}))
    )
    assert with_dropout.evaluations == pytest.approx(
        run("gpt", 3, 1, Settings(**(vars(settings) | {"optimizer": OptimizerSpec(name="sgd", lr=1e-12)}))).evaluations,
        rel=1e-6,
    )
