"""Progress bars on stderr for a person at a terminal; silence for everybody else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def counting(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Pass `items` on, and count them in a progress bar when stderr is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, f"[dim]{what}", total=total, console=Console(stderr=True), transient=True)
