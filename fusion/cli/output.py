"""What the commands print: results on stdout, remarks and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table


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


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> Table:
    """A plain table; the columns named in `right` hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def show(renderable: Any) -> None:
    """Print something of rich's; as wide as it needs to be when stdout is no terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    with _to_stdout():
        console.print(renderable)


def clock(seconds: float | None) -> str:
    """A moment as people write it, local time."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S") if seconds else "-"


def number(value: Any, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
