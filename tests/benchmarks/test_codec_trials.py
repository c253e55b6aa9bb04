"""The quantizers that `codec_trials.py` tries: what they do to values, and what their codes take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.codec_trials import (
    INT4,
    STOCHASTIC_2,
    TRIALS,
    WIDTH,
    Grid,
    Means,
    Sizes,
    quantized,
    report,
    rows,
    train,
)
from benchmarks.rows_file import RowsFile


def noise() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("grid", [INT4, rows(0.5), rows(0.5, rotated=True)], ids=str)
def test_rounding_stays_within_half_a_step(grid: Grid) -> None:
    value = torch.randn(4, 16, WIDTH, generator=noise())
    got = quantized(value, grid, noise(), None)
    step = 3.6 * 2 / 7 if grid.levels else 0.5 * 1.4
    error = (got - value) @ torch.eye(WIDTH) if not grid.rotated else got - value
    assert error.pow(2).mean().sqrt() < 0.6 * step
    assert not got.equal(value)
    assert quantized(torch.zeros(1, WIDTH), grid, noise(), None).equal(torch.zeros(1, WIDTH))


def test_stochastic_rounding_is_right_on_average() -> None:
    value = torch.randn(1, WIDTH, generator=noise())
    dice = noise()
    mean = sum(quantized(value, STOCHASTIC_2, dice, None) for _ in range(2000)) / 2000
    assert (mean - value).abs().max() < 0.2


def test_codes_are_counted_with_their_scales_and_coded_near_their_entropy() -> None:
    sizes = Sizes()
    codes = torch.tensor(np.random.default_rng(0).choice([-1, 0, 1], 40_000, p=[0.1, 0.8, 0.1]))
    sizes.count(codes, scales=160, levels=1)
    assert sizes.values == 40_000
    assert sizes.plain == pytest.approx(40_000 * np.log2(3) + 160, abs=1)
    entropy = -(0.8 * np.log2(0.8) + 0.2 * np.log2(0.1)) * 40_000
    assert entropy < sizes.coded < 1.1 * entropy


@pytest.mark.parametrize("before", [1, 2])
def test_means_come_to_expect_what_tokens_and_a_position_bring(before: int) -> None:
    means = Means(5, before)
    dice = noise()
    by_tokens, by_position = torch.randn(before, 5, WIDTH, generator=dice), torch.randn(128, WIDTH, generator=dice)
    by_position -= by_position.mean(0)

    def value(tokens: torch.Tensor) -> torch.Tensor:
        return sum((mean[tokens.roll(back, 1)] for back, mean in enumerate(by_tokens)), by_position)

    for _ in range(60):
        tokens = torch.randint(5, (4, 128), generator=dice)
        means.learn(tokens, value(tokens))
    tokens = torch.randint(5, (4, 128), generator=dice)
    assert (means.expect(tokens) - value(tokens)).pow(2).mean() < 0.02


def test_a_trial_trains_and_tells_its_sizes() -> None:
    text = b"to be, or not to be, that is the question: " * 20
    dense, lossy = (train(trial, text, steps=2) for trial in (TRIALS[0], TRIALS[-1]))
    assert dense["ratio"] == {}
    assert lossy["ratio"]["coded"] > lossy["ratio"]["plain"] > 8
    assert lossy["loss"] == pytest.approx(dense["loss"], rel=0.05)
    assert lossy["loss"] != dense["loss"]
    assert len({trial.name for trial in TRIALS}) == len(TRIALS)


def test_both_goals_are_reached_only_with_every_seed(tmp_path: Path) -> None:
    runs = []
    for seed, losses in enumerate([(2.0, 2.03, 2.05), (2.1, 2.15, 2.2)]):
        found = RowsFile(tmp_path / f"{seed}.json", {})
        for trial, loss, coded in zip(TRIALS, losses, (1.0, 17.0, 20.0), strict=False):
            found.add(trial.name, {"loss": loss, "ratio": {"plain": 8.0, "coded": coded} if coded > 1 else {}})
        runs.append(found)
    alone, both = ("\n".join(report(*files)).splitlines() for files in (runs[:1], runs))
    assert [line.endswith("| yes |") for line in alone[2:]] == [False, True, False]
    assert [line.endswith("| yes |") for line in both[2:]] == [False, False, False]
    assert "2.030, 2.150 | +1.5%, +2.4%" in both[3]
