"""What this worker sent in the current and the previous step, so that it can be sent again on request.

A fragment that has finished step `s` has seen gradients (or norms) of `s` that its neighbours could only make after they
had consumed everything of step `s - 1`; so `forget(s - 1)` is safe then. Sans I/O; entries of one step go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from fusion.wire import FrameKind

Key = tuple[FrameKind, int, int, int]
Payload = TypeVar("Payload")


@dataclass(frozen=True, slots=True)
class Sent(Generic[Payload]):
    """One message as it went out."""

    peer: str
    header: bytes
    payload: Payload


class ReplayLog(Generic[Payload]):
    """Messages by receiver and key `(kind, edge, step, micro_batch)`."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[tuple[str, Key], Sent[Payload]]] = {}
        self._oldest = 0

    def record(self, key: Key, sent: Sent[Payload]) -> None:
        """Keep a message; one of a step that is already forgotten is not kept."""
        step = key[2]
        if step >= self._oldest:
            self._steps.setdefault(step, {})[sent.peer, key] = sent

    def find(self, peer: str, key: Key) -> Sent[Payload] | None:
        """The message that went to `peer` under `key`, if it was made and is not forgotten."""
        return self._steps.get(key[2], {}).get((peer, key))

    def forget(self, through: int) -> None:
        """Drop everything of steps up to and including `through`."""
        self._oldest = max(self._oldest, through + 1)
        for step in [step for step in self._steps if step <= through]:
            del self._steps[step]

    def __iter__(self) -> Iterator[Sent[Payload]]:
        for step in sorted(self._steps):
            yield from self._steps[step].values()

    def __len__(self) -> int:
        return sum(len(messages) for messages in self._steps.values())
