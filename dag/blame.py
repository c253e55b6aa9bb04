"""Finds the user's own line: in an exception's traceback, or in the stack text that torch keeps with a traced node."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

_OURS = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
_LIBRARIES = (_OURS, _TORCH, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "<")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def line_of_stack(stack: str | None) -> str:
    """`file:line` of the innermost frame of the user's in a node's `stack_trace`, or "" when there is none."""
    return _innermost((match[1], int(match[2])) for match in _FRAME.finditer(stack or ""))


def line_of_exception(error: BaseException) -> str:
    """`file:line` of the innermost frame of the user's in `error` or in what caused it, or "" when there is none."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        line = _innermost(_frames(current.__traceback__)) or line_of_stack(str(current))
        if line:
            return line
        current = current.__cause__ or current.__context__
    return ""


def _frames(traceback: TracebackType | None) -> Iterable[tuple[str, int]]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next


def _innermost(frames: Iterable[tuple[str, int]]) -> str:
    """Code that the user installed (a model library) counts only when none of their own files is on the stack."""
    own = installed = ""
    for filename, line in frames:
        if "site-packages" in filename:
            if not filename.startswith(_LIBRARIES):
                installed = f"{filename}:{line}"
        elif not filename.startswith(_LIBRARIES):
            own = f"{filename}:{line}"
    return own or installed
