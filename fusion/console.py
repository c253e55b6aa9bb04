"""Lines of daemons for people, on stdout and stderr: one that can't be printed stops nothing.

The reader may have gone (`| head`, a dead log collector), may read no more (Ctrl-S, a stopped pager), or its disk may be full.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import sys
from typing import TextIO

_PIECE = 1000
"""Characters: a pipe that takes anything takes this much (4096 bytes) without blocking."""


def say(line: str, stream: TextIO | None = None) -> None:
    """Print a line on `stream` (default: stdout), as far as that is possible at once. Raises nothing."""
    to = sys.stdout if stream is None else stream
    if to is None:  # Closed before Python started.
        return
    encoding = to.encoding or "utf-8"
    text = (line + "\n").encode(encoding, "backslashreplace").decode(encoding)
    with contextlib.suppress(OSError, ValueError):
        for start in range(0, len(text), _PIECE):
            if not _takes_more(to):
                return
            to.write(text[start : start + _PIECE])
            to.flush()


def settle() -> None:
    """Flush stdout and stderr for the last time; what they don't take is dropped, so that Python at its end does not
    complain of it and change the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            if _takes_more(stream):
                stream.flush()
                continue
        except (OSError, ValueError):
            pass
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


class LineHandler(logging.Handler):
    """Log records as lines on `stream` (default: what stderr is at the time)."""

    def __init__(self, stream: TextIO | None = None, level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
        else:
            say(line, self._stream or sys.stderr)


def log_lines() -> None:
    """Have warnings and errors that nobody asked to log elsewhere, printed on stderr, as Python does, by `say`."""
    logging.lastResort = LineHandler(level=logging.WARNING)


def _takes_more(stream: TextIO) -> bool:
    """Whether a piece can be written without waiting; a reader that has gone does not count as waiting."""
    try:
        return bool(select.select([], [stream.fileno()], [], 0)[1])
    except (OSError, ValueError):
        return True  # No file of the system's, or one that can't be asked.
