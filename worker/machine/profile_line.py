"""A line through timings: a fixed time, and what each unit more takes. For operators it is calls and FLOPs; for links alpha and beta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Line:
    """`amount` units take `seconds + amount / rate`."""

    seconds: float
    rate: float


def fit(points: Sequence[tuple[float, float]]) -> Line:
    """The line with the least squares of relative errors through (amount, seconds), all of them above 0; neither part is negative.

    Raises `ValueError` without points.
    """
    if not points:
        raise ValueError("no timings to put a line through")
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_amount = sum(w * amount for w, (amount, _) in zip(weights, points, strict=True)) / total
    mean_seconds = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    spread = sum(w * (amount - mean_amount) ** 2 for w, (amount, _) in zip(weights, points, strict=True))
    together = sum(
        w * (amount - mean_amount) * (seconds - mean_seconds)
        for w, (amount, seconds) in zip(weights, points, strict=True)
    )
    slope = together / spread if spread > 0 else 0.0
    if slope <= 0 or mean_seconds < slope * mean_amount:
        # One size only, or times that noise has put in another order: all time counts as time of the units.
        squares = sum(w * amount**2 for w, (amount, _) in zip(weights, points, strict=True))
        products = sum(w * amount * seconds for w, (amount, seconds) in zip(weights, points, strict=True))
        return Line(0.0, squares / products)
    return Line(mean_seconds - slope * mean_amount, 1 / slope)
