"""What is under way of spot checks, and what the words of all sides come to. Sans-I/O.

The checker tells what a fragment makes, without having been told what to expect; the others tell what they got of it. So a
cheat can't show different things to each. Where checker and host got different things to begin with, the host or who showed
them lies, and nobody else can tell which of the two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from fusion.messages import Digest, Receipts, Replayed

TOLERANCE = 0.02
"""Relative distance that is let pass between machines that do not compute the same bits."""

_WORDS = {"ACTIVATION": "output", "GRADIENT": "gradient", "NORMS": "gradient norms"}


class SpotCheck(BaseModel):
    """One fragment, from one common snapshot to the next."""

    fragment: int
    host: str
    checker: str
    exact: bool
    """Checker and host are of one kind: every bit counts."""
    receipts: dict[str, Receipts] = Field(default_factory=dict)
    replayed: Replayed | None = None
    void: str = ""
    """Why it can't be made."""


class Inspection(BaseModel):
    """The checks of one stretch of steps."""

    epoch: int
    after: int
    through: int
    ordered_at: float
    witnesses: list[str] = Field(default_factory=list)
    """Who was asked for receipts."""
    checks: list[SpotCheck] = Field(default_factory=list)

    def decided(self, check: SpotCheck) -> bool:
        """Whether everybody has spoken."""
        told = check.replayed is not None and check.receipts.keys() >= set(self.witnesses)
        return bool(check.void) or told


@dataclass(frozen=True, slots=True)
class Verdict:
    """What comes of a check. `blamed` are the workers one of which, at least, does not tell or compute the truth."""

    kind: Literal["passed", "failed", "void"]
    step: int = 0
    words: str = ""
    blamed: tuple[str, ...] = ()


def judge(check: SpotCheck, parts: Mapping[int, str], losses: Mapping[int, float]) -> Verdict:
    """Of a check that is decided. `parts` are digests of checkpoint parts by step, `losses` those that were reported."""
    found = check.replayed
    if check.void or found is None:
        return Verdict("void", words=check.void)
    own = check.receipts.get(check.host)
    used = _by_key(own.used if own is not None else ())
    for shower, digests in sorted(found.used.items()):
        told = _earliest(_by_key(digests), used)
        if told is not None and shower != check.host:
            words = f"{shower} shows another {_named(told)} than {check.host} says it got"
            return Verdict("failed", told[2], words, (shower, check.host))
    made = _by_key(found.made)
    faults: list[tuple[int, str]] = []
    for receiver, receipts in sorted(check.receipts.items()):
        if receiver != check.host and (told := _earliest(made, _by_key(receipts.got))) is not None:
            faults.append((told[2], f"{check.host}'s {_named(told)} as {receiver} got it"))
        if check.exact and receiver != check.host and receipts.state not in ("", found.states.get(found.through, "")):
            faults.append((found.through, f"the snapshot that {check.host} sent of it"))
    for step, digest in parts.items():
        if check.exact and found.states.get(step, digest) != digest:
            faults.append((step, f"{check.host}'s part of the checkpoint"))
    for step, loss in found.losses.items():
        reported = losses.get(step)
        if reported is not None and not _near(reported, loss, 0.0 if check.exact else TOLERANCE):
            faults.append((step, f"the loss that {check.host} reported"))
    if not check.exact and found.deviation > TOLERANCE:
        faults.append((found.through, f"what {check.host} made of it, by {found.deviation:.1%},"))
    if not faults:
        return Verdict("passed")
    step, what = min(faults, key=lambda fault: fault[0])
    return Verdict("failed", step, f"{what} differs from {check.checker}'s", (check.host,))


def _by_key(digests: Iterable[Digest]) -> dict[tuple[str, int, int, int], str]:
    return {(kind, index, step, micro_batch): digest for kind, index, step, micro_batch, digest in digests}


def _earliest(
    one: Mapping[tuple[str, int, int, int], str], other: Mapping[tuple[str, int, int, int], str]
) -> tuple[str, int, int, int] | None:
    """The first step's message for which the two have different digests; of what only one has there is nothing to say."""
    different = [key for key in one.keys() & other.keys() if one[key] != other[key]]
    return min(different, key=lambda key: (key[2], key[3], key)) if different else None


def _named(key: tuple[str, int, int, int]) -> str:
    kind, _, step, micro_batch = key
    return f"{_WORDS[kind]} (step {step}, micro-batch {micro_batch})"


def _near(one: float, other: float, tolerance: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return one == other or (math.isnan(one) and math.isnan(other))
    return abs(one - other) <= tolerance * max(abs(one), abs(other))
