"""Runs fragments: task ordering, build, forward, backward, update.

`executor.ordering` and `executor.board` are free of torch and may be imported anywhere; the names of `executor.program`
are re-exported here lazily, so that importing this package does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from executor.board import TaskBoard
from executor.ordering import Task, TaskKind, TaskOrder

if TYPE_CHECKING:
    from executor.passes import ForwardResult
    from executor.program import FragmentProgram

__all__ = ["ForwardResult", "FragmentProgram", "Task", "TaskBoard", "TaskKind", "TaskOrder"]

_LAZY = {"ForwardResult": "executor.passes", "FragmentProgram": "executor.program"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
