"""The formulas of the schedules, and agreement with torch's own schedulers."""

import math

import pytest
import torch

from executor.learning_rate import factor
from fusion.spec import LrScheduleSpec


def rates(steps: int, **options: object) -> list[float]:
    schedule = LrScheduleSpec(**options)  # type: ignore[arg-type]
    return [factor(schedule, step, steps) for step in range(1, steps + 1)]


def test_constant() -> None:
    assert rates(3, name="constant") == [1.0, 1.0, 1.0]


def test_warm_up_reaches_the_peak_and_the_shape_starts_there() -> None:
    assert rates(6, name="linear", warmup=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.5]


def test_linear_and_cosine_head_for_the_final_factor() -> None:
    assert rates(4, name="linear", final=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * s / 4)) / 2 for s in range(4)]
    assert rates(4, name="cosine", final=0.1) == pytest.approx(expected)


def test_step_drops_every_so_many_steps_after_the_warm_up() -> None:
    assert rates(7, name="step", warmup=1, every=2, gamma=0.5) == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_a_warm_up_as_long_as_the_run_never_divides_by_zero() -> None:
    assert rates(2, name="cosine", warmup=2) == [0.5, 1.0]
    assert rates(2, name="cosine", warmup=5) == [0.2, 0.4]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_agrees_with_torch(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if name == "cosine":
        scheduler: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    else:
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-9, 10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(10, name=name) == pytest.approx(expected, abs=1e-8)
