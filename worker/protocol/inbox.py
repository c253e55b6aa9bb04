"""Arrivals by key until the tasks that need them have run. Sans I/O.

The task board decides what is wanted (duplicates and what is used up are not), so what waits here is bounded by the plan.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from worker.protocol.replay_log import Key

Value = TypeVar("Value")


class Inbox(Generic[Value]):
    """Values by key `(kind, edge, step, micro_batch)`."""

    def __init__(self) -> None:
        self._values: dict[Key, Value] = {}

    def put(self, key: Key, value: Value) -> None:
        """Keep a value. Raises `ValueError` when the key is here already."""
        if key in self._values:
            raise ValueError(f"{key} is here already")
        self._values[key] = value

    def get(self, key: Key) -> Value:
        """Look at a value that several tasks use. Raises `KeyError`."""
        return self._values[key]

    def take(self, key: Key) -> Value:
        """Take a value out for the one task that uses it. Raises `KeyError`."""
        return self._values.pop(key)

    def discard(self, key: Key) -> None:
        """Drop a value that nobody here needs any more."""
        self._values.pop(key, None)

    def close(self, through: int) -> None:
        """Steps up to and including `through` are over: drop what is left of them."""
        for key in [key for key in self._values if key[2] <= through]:
            del self._values[key]

    def __contains__(self, key: Key) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)
