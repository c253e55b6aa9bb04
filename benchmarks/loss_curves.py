"""Losses over the steps of a run, short enough to keep: means of ten steps, and what they come to at a time."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

EVERY = 10
LAST = 20
"""Steps whose mean is the loss at the end."""


def curve(losses: Sequence[float]) -> list[float]:
    """Means of every ten steps; a shorter rest at the end is left out."""
    whole = len(losses) - len(losses) % EVERY
    return [round(mean(losses[first : first + EVERY]), 5) for first in range(0, whole, EVERY)]


def last(losses: Sequence[float]) -> float:
    """The mean of the last steps."""
    return round(mean(losses[-LAST:]), 5)


def at_step(means: Sequence[float], step: float) -> float | None:
    """The loss about `step`, over as many steps before it as `last` takes; None before the first ten are over.

    Beyond the last mean it stays what it was, as nobody knows.
    """
    tens = min(step / EVERY, float(len(means)))
    if tens < 1:
        return None
    whole = int(tens)
    later = min(whole + 1, len(means))
    return _before(means, whole) + (tens - whole) * (_before(means, later) - _before(means, whole))


def _before(means: Sequence[float], tens: int) -> float:
    return mean(means[max(0, tens - LAST // EVERY) : tens])
