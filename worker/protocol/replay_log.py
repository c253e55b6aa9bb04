"""What this worker sent since the last common snapshot, so that it can be sent again, to whoever needs it now. Sans I/O.

Without backups nobody can replay, and two steps are enough: a fragment that has finished step `s` has seen gradients (or
norms) of `s` that its neighbours could only make after they had consumed everything of step `s - 1`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from compress.settings import self_contained
from fusion.wire import FrameKind, Header

Key = tuple[FrameKind, int, int, int]


class Parcel(Protocol):
    """What a message carries, as far as the log looks into it."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes now."""


P = TypeVar("P", bound=Parcel)


@dataclass(frozen=True, slots=True)
class Sent(Generic[P]):
    """One message as it was made; its epoch is stamped anew each time it goes out."""

    header: Header
    parcel: P

    def again(self, epoch: int) -> Header:
        """The header to send it with once more: to whoever may not have what a payload could leave out."""
        return replace(self.header, epoch=epoch, codec=self_contained(self.header.codec))


class ReplayLog(Generic[P]):
    """Messages by key `(kind, edge, step, micro_batch)`."""

    def __init__(self) -> None:
        self._steps: dict[int, dict[Key, Sent[P]]] = {}
        self._oldest = 0

    @property
    def nbytes(self) -> int:
        """Memory that the payloads take."""
        return sum(sent.parcel.nbytes for sent in self)

    def record(self, header: Header, parcel: P) -> None:
        """Keep a message; one of a step that is already forgotten is not kept."""
        if header.step >= self._oldest:
            self._steps.setdefault(header.step, {})[header.key] = Sent(header, parcel)

    def find(self, key: Key) -> Sent[P] | None:
        """The message with this key, if it was made and is not forgotten."""
        return self._steps.get(key[2], {}).get(key)

    def forget(self, through: int) -> None:
        """Drop everything of steps up to and including `through`."""
        self._oldest = max(self._oldest, through + 1)
        for step in [step for step in self._steps if step <= through]:
            del self._steps[step]

    def __iter__(self) -> Iterator[Sent[P]]:
        """In step order, and within a step in the order in which they were made."""
        for step in sorted(self._steps):
            yield from self._steps[step].values()

    def __len__(self) -> int:
        return sum(len(messages) for messages in self._steps.values())
