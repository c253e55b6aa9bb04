"""Loads and calls what a job spec names as `file.py:function` or `package.module:function`, and says clearly what went wrong."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fusion import import_views
from fusion.errors import FusionError, UserError, one_line
from fusion.yaml_file import suggest


@contextmanager
def printing_aside() -> Iterator[None]:
    """What the user's code prints goes to stderr meanwhile: stdout is for results, which a program may read."""
    with redirect_stdout(sys.stderr):
        yield


@dataclass(frozen=True)
class Entrypoint:
    """A function of the user's, ready to be called."""

    target: str
    """As the spec writes it."""
    where: str
    """Which key of the spec names it, e.g. `model.entrypoint`."""
    function: Callable[..., Any]
    folder: Path
    """The folder whose files count as the user's code."""
    error: type[UserError] = UserError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it. Raises `error` with the user's file and line when it does; the original error is the cause."""
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):
            signature = None
        if signature is not None:
            self._check_arguments(signature, args, kwargs)
        try:
            return self.function(*args, **kwargs)
        except FusionError:
            raise
        except (Exception, SystemExit) as error:
            raise self.error(f"{self.where} {self.target!r}: {explain(error, self.folder)}") from error

    def _check_arguments(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            known = [
                name
                for name, parameter in signature.parameters.items()
                if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            ]
            unknown = next((name for name in kwargs if name not in known), None)
            if unknown is not None:
                reason = f"takes no argument {unknown!r}{suggest(unknown, known)}"
            else:
                reason = f"can't be called with these arguments: {error}"
            raise self.error(f"{self.where} {self.target!r} {reason}") from None


def load_entrypoint(target: str, base: Path, *, where: str, error: type[UserError] = UserError) -> Entrypoint:
    """Find the function that `target` names; a file's path is relative to `base`, the spec's folder.

    The file's own folder (for a module: `base`) comes first on `sys.path` from now on. Raises `error`.
    """
    place, separator, name = target.rpartition(":")
    if not separator or not place or not name:
        raise error(f"{where}: {target!r} does not name a function; write file.py:function or package.module:function")
    import_views.claim_our_names()
    if place.endswith(".py") or "/" in place:
        file = (base / place).resolve()
        if not file.is_file():
            raise error(f"{where}: no such file: {file}{_nearby(file)}")
        folder = file.parent
        _put_first(folder)
        module = _import(lambda: _load_file(file), target, folder, where, error)
    else:
        folder = base.resolve()
        _put_first(folder)
        module = _import(lambda: _load_module(place, folder), target, folder, where, error)
    function: Any = module
    for part in name.split("."):
        if not hasattr(function, part):
            known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise error(f"{where}: {place} has no function {name!r}{suggest(name, known)}")
        function = getattr(function, part)
    if not callable(function):
        raise error(f"{where}: {name!r} in {place} is not a function but a {type(function).__name__}")
    return Entrypoint(target, where, function, folder, error)


def explain(error: BaseException, folder: Path) -> str:
    """`models/gpt.py:12: ValueError: ...`: the innermost line of the user's code that an exception passed through."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if _is_own(Path(frame.filename).resolve(), folder)]
    message = f"{type(error).__name__}: {one_line(error)}" if str(error).strip() else type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        message = f"it imports {error.name!r}, which is not installed here ({message})"
    if not inside:
        return message
    last = inside[-1]
    code = (last.line or linecache.getline(last.filename, last.lineno or 0)).strip()
    return f"{last.filename}:{last.lineno}: {message}" + (f"  (at: {code})" if code else "")


def _is_own(file: Path, folder: Path) -> bool:
    """Whether the file is of this folder, and neither of an environment there nor of Fusion: README's folder has both."""
    if not file.is_relative_to(folder) or import_views.is_ours(file):
        return False
    return "site-packages" not in file.relative_to(folder).parts


def _import(
    load: Callable[[], ModuleType], target: str, folder: Path, where: str, error: type[UserError]
) -> ModuleType:
    try:
        return load()
    except FusionError:
        raise
    except ModuleNotFoundError as missing:
        module = target.rpartition(":")[0]
        if missing.name and (module == missing.name or module.startswith(f"{missing.name}.")):
            raise error(
                f"{where}: no module {missing.name!r} in {folder} or installed; "
                f"write the path of a file, or install the package"
            ) from missing
        raise error(f"{where} {target!r} can't be imported: {explain(missing, folder)}") from missing
    except (Exception, SystemExit) as cause:
        raise error(f"{where} {target!r} can't be imported: {explain(cause, folder)}") from cause


def _put_first(folder: Path) -> None:
    import_views.register(folder)
    entry = str(folder)
    if sys.path[:1] != [entry]:
        if entry in sys.path:
            sys.path.remove(entry)
        sys.path.insert(0, entry)


def _load_file(file: Path) -> ModuleType:
    """Import a file under its plain name where that is free, so that other files of the user's find the same module."""
    name = file.stem
    hidden = import_views.hidden_name(file.parent, name)
    if hidden is not None:
        return importlib.import_module(hidden)
    present = sys.modules.get(name)
    if present is not None and getattr(present, "__file__", None) == str(file):
        return present
    if present is None and name.isidentifier() and name not in sys.stdlib_module_names:
        return _execute(name, file)
    return _execute(f"_fusion_entrypoint_{abs(hash(str(file)))}", file)


def _execute(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _load_module(name: str, folder: Path) -> ModuleType:
    top, dot, rest = name.partition(".")
    hidden = import_views.hidden_name(folder, top)
    return importlib.import_module(f"{hidden}{dot}{rest}" if hidden is not None else name)


def _nearby(file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return f" (there is no folder {folder} either)"
    near = suggest(file.name, sorted(path.name for path in folder.glob("*.py")))
    return near if "did you mean" in near else ""
