"""Finds the user's own line: in an exception's traceback, or in the stack text that torch keeps with a traced node."""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

_OURS = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)
_LIBRARIES = (_OURS, _TORCH, sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), "<")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def line_of_stack(stack: str | None) -> str:
    """`file:line` of the innermost frame of the user's in a node's `stack_trace`, or "" when there is none."""
    return _innermost((match[1], int(match[2])) for match in _FRAME.finditer(stack or ""))


def line_of_exception(error: BaseException) -> str:
    """`file:line` of the innermost frame of the user's in `error` or in what caused it, or "" when there is none."""
    for each in causes(error):
        line = _innermost(_frames(each.__traceback__)) or line_of_stack(str(each))
        if line:
            return line
    return ""


def module_of_exception(error: BaseException, model: nn.Module) -> tuple[str, nn.Module] | None:
    """Path and module of `model`, the innermost in whose call `error` or what caused it was raised; None outside of all."""
    paths = {id(module): path for path, module in model.named_modules()}
    for each in causes(error):
        found, traceback = None, each.__traceback__
        while traceback is not None:
            module = traceback.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in paths:
                found = paths[id(module)], module
            traceback = traceback.tb_next
        if found is not None:
            return found
    return None


def torch_functions(error: BaseException) -> set[str]:
    """Names of the functions of torch's own, written in Python, in which `error` or what caused it was raised."""
    found: set[str] = set()
    for each in causes(error):
        traceback = each.__traceback__
        while traceback is not None:
            code = traceback.tb_frame.f_code
            if code.co_filename.startswith(_TORCH):
                found.add(code.co_name)
            traceback = traceback.tb_next
    return found


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, what caused it, what caused that."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def module_words(path: str, kind: str) -> str:
    """How a person finds a module of the model: `module layers.0 (Linear)`."""
    return f"module {path} ({kind})" if path else f"the model ({kind})"


def is_users(filename: str) -> bool:
    """Whether a file is the user's own, or of a library that is neither torch nor Python's own nor Fusion."""
    return not filename.startswith(_LIBRARIES)


def line_of_function(function: Any) -> str:
    """`file:line` of where a function begins, or "" for one that is not written in Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else ""


def line_of_attribute(owner: object, name: str) -> str:
    """`file:line` where a method of `owner`'s class, not its constructor, sets attribute `name`; else where it uses it."""
    return min(_lines(owner, _uses, name), key=lambda use: use[0], default=(0, ""))[1]


def line_of_branch(owner: object, name: str) -> str:
    """`file:line` where a method of `owner`'s class has an `if` on attribute `name`, or ""."""
    return next(_lines(owner, _branches, name), (0, ""))[1]


def _lines(
    owner: object, find: Callable[[ast.AST, str], Iterable[tuple[int, int]]], name: str
) -> Iterator[tuple[int, str]]:
    for cls in type(owner).__mro__:
        if cls.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        try:
            file, (lines, first) = inspect.getsourcefile(cls), inspect.getsourcelines(cls)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, TypeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                for rank, line in find(node, name):
                    yield rank, f"{file}:{first + line - 1}"


def _uses(method: ast.AST, name: str) -> Iterator[tuple[int, int]]:
    """Lines that mention an attribute: 0 assigns it, 1 uses what is in it (`.append`, `[...]`), 2 any other."""
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and node.attr == name:
            yield 2 if isinstance(node.ctx, ast.Load) else 0, node.lineno
        if isinstance(node, ast.Attribute | ast.Subscript):
            within = node.value
            if isinstance(within, ast.Attribute) and within.attr == name:
                yield 1, node.lineno


def _branches(method: ast.AST, name: str) -> Iterator[tuple[int, int]]:
    for node in ast.walk(method):
        if isinstance(node, ast.If | ast.IfExp) and any(
            isinstance(part, ast.Attribute) and part.attr == name for part in ast.walk(node.test)
        ):
            yield 0, node.test.lineno


def _frames(traceback: TracebackType | None) -> Iterable[tuple[str, int]]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next


def _innermost(frames: Iterable[tuple[str, int]]) -> str:
    """Code that the user installed (a model library) counts only when none of their own files is on the stack."""
    own = installed = ""
    for filename, line in frames:
        if "site-packages" in filename:  # which may lie within a folder of Python's own
            if not filename.startswith((_OURS, _TORCH)):
                installed = f"{filename}:{line}"
        elif is_users(filename):
            own = f"{filename}:{line}"
    return own or installed
