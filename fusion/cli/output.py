"""What the commands print: results on stdout, remarks and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from fusion.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_GAP = 3
"""Characters between two columns."""
_FOLDED_WIDTH = 20


@contextmanager
def _to_stdout() -> Iterator[None]:
    """Raises `UserError` when it can't be written; that its reader has left (`| head`) is no error to tell."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"can't write to stdout: {error.strerror or error}") from None


def out(text: str) -> None:
    """A line of the result."""
    with _to_stdout():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def note(text: str) -> None:
    """A remark to the person; never part of the result."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def print_json(value: Any) -> None:
    out(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def table(
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Sequence[str] = (),
    *,
    least: Sequence[str] = (),
    folded: Sequence[str] = (),
) -> Table:
    """A plain table; the columns named in `right` hold numbers.

    On a narrow terminal those in `least` are left out, the first one first, until the others fit in whole, but for the ones in
    `folded`, whose words go on in the next line.
    """
    from rich import box
    from rich.table import Table

    rows = [tuple(row) for row in rows]
    widths = {column: _width(column, [row[index] for row in rows], folded) for index, column in enumerate(columns)}
    console = _console()
    if console.is_terminal:
        for column in least:
            if _total(widths) > console.width:
                del widths[column]
    whole = bool(least) and _total(widths) <= console.width
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in widths:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(column, justify=justify, overflow="fold", no_wrap=whole and column not in folded)
    for row in rows:
        made.add_row(*(cell for column, cell in zip(columns, row, strict=True) if column in widths))
    return made


def _width(column: str, cells: Sequence[str], folded: Sequence[str]) -> int:
    """Characters that a column takes, at least."""
    if column not in folded:
        return max(len(text) for text in (column, *cells))
    return max(len(word) for word in (*column.split(), *(cell[:_FOLDED_WIDTH] for cell in cells)))


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    return console


def show(renderable: Any) -> None:
    """Print something of rich's; as wide as it needs to be when stdout is no terminal."""
    with _to_stdout():
        _console().print(renderable)


def clock(seconds: float | None) -> str:
    """A moment as people write it, local time."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else "-"


def number(value: Any, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
