"""Values that are owed here and come in a form that is refused: whoever sent one sends the same bytes again, so asking has an end.

Sans I/O.
"""

from __future__ import annotations

from collections.abc import Iterable

from fusion.errors import PlanError
from worker.protocol.replay_log import Key

MOST = 3
"""The first may have been sent before a change of placement; the others are answers to what was asked."""


class Refusals:
    """Counts what was refused of what the next tasks wait for, and of nothing else: so it stays small whatever comes."""

    def __init__(self) -> None:
        self._counts: dict[Key, int] = {}

    def note(self, key: Key, sender: str, why: str, owed: Iterable[tuple[str, Key]]) -> None:
        """A value of `sender` was refused. Raises `PlanError` when there is no hope that it will ever be taken."""
        wanted = {asked for _, asked in owed}
        self._counts = {known: count for known, count in self._counts.items() if known in wanted}
        if key not in wanted:
            return
        self._counts[key] = count = self._counts.get(key, 0) + 1
        if count >= MOST:
            kind, edge, step, micro_batch = key
            raise PlanError(
                f"{sender} has sent {kind.name.lower()} {edge} of step {step}, micro-batch {micro_batch}, {count} times in a "
                f"form that is refused here ({why}); do both run the same Fusion and torch? `fusion drain {sender}` "
                "leaves it out of the next run"
            )
