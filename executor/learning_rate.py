"""The learning rate of a step: the optimizer's peak rate times the schedule's factor.

With s = step - 1 (steps count from 1), S steps in all and W warm-up steps, the factor is

- warm-up, s < W:  (s + 1) / W
- constant:        1
- linear:          1 - (1 - final) * p
- cosine:          final + (1 - final) * (1 + cos(pi * p)) / 2
- step:            gamma ** ((s - W) // every)

where p = (s - W) / (S - W) runs from 0 at the first step after the warm-up; the value `final` belongs to s = S, the end
of the last step, so no step is spent at a rate of zero.
"""

from __future__ import annotations

import math

from fusion.spec import LrScheduleSpec


def factor(schedule: LrScheduleSpec, step: int, steps: int) -> float:
    """The factor on the peak learning rate at `step` (from 1) of `steps`."""
    s = step - 1
    if s < schedule.warmup:
        return (s + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "step":
        drops = (s - schedule.warmup) // schedule.every
        return float(schedule.gamma**drops)
    progress = (s - schedule.warmup) / max(1, steps - schedule.warmup)
    if schedule.name == "linear":
        return 1.0 - (1.0 - schedule.final) * progress
    return schedule.final + (1.0 - schedule.final) * (1.0 + math.cos(math.pi * progress)) / 2.0
