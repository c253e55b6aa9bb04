"""Messages of a spot check: one worker runs a fragment's steps again, the others say what they had got of it.

Nobody is told what to expect: each side names digests, and the coordinator compares.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fusion.messages.base import Message, Words

Digest = tuple[
    Literal["ACTIVATION", "GRADIENT", "NORMS"],
    int,
    int,
    int,
    Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")],
]
"""(kind, edge, step, micro-batch, 128 bits of BLAKE2b over the value; empty for a null gradient)."""


class Check(Message):
    """Coordinator -> worker: `checker` runs the fragment again from the snapshot of `after` through `through`.

    It says `Replayed` or `CheckVoid`; the others show it what it asks for, and everybody says `Receipts`.
    """

    type: Literal["check"] = "check"
    job: str
    epoch: int
    fragment: int
    checker: str
    after: int = Field(ge=0)
    through: int = Field(ge=1)
    exact: bool = True
    """Checker and host are of one kind, so every bit counts; otherwise the host's values are looked at with tolerance."""


class _OfCheck(Message):
    job: str
    epoch: int
    fragment: int
    through: int


class Receipts(_OfCheck):
    """Worker -> coordinator: what I got of the fragment; what I used for it, when I host it; its snapshot, when I hold it."""

    type: Literal["receipts"] = "receipts"
    got: list[Digest] = Field(default_factory=list)
    used: list[Digest] = Field(default_factory=list)
    state: str = ""
    """First half of the SHA-256 of the snapshot after `through`; empty when it is not here."""


class Replayed(_OfCheck):
    """Checker -> coordinator: what the fragment makes from what I was shown."""

    type: Literal["replayed"] = "replayed"
    made: list[Digest]
    used: dict[str, list[Digest]] = Field(default_factory=dict)
    """By the worker that showed it."""
    states: dict[int, str]
    """First half of the SHA-256 of the state after `through`, and after each step of a checkpoint on the way."""
    losses: dict[int, float] = Field(default_factory=dict)
    deviation: float = Field(default=0.0, ge=0)
    """Without exactness: the largest relative distance between what was shown and what was computed."""


class CheckVoid(_OfCheck):
    """Checker -> coordinator: the check can't be made, and why."""

    type: Literal["check-void"] = "check-void"
    message: Words
