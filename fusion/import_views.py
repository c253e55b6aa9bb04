"""Lets code of two sides use the same module name: `import scheduler` gives ours to us, and the user's own to the user.

Our packages have everyday names (`dag`, `worker`, `scheduler` ...), and so may a file beside the user's model. Under their
plain names `sys.modules` holds ours. A user's module whose name is taken is loaded as a part of a hidden package whose
path is the user's folder, and an import statement is answered by who asks: code of ours gets ours, code in the user's
folder gets the folder's own module where there is one. Because the asker decides, it also holds for imports that run
late, inside a function, while both sides are at work. Nothing is patched until a folder does hold a taken name.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

OUR_NAMES = ("fusion", "dag", "compress", "executor", "scheduler", "worker", "coordinator")
OUR_ROOT = Path(__file__).resolve().parent.parent
_OURS = tuple(OUR_ROOT / name for name in OUR_NAMES)
_HIDDEN = "_fusion_user_code_"


class _Folder:
    """One folder of user code, and the hidden package that holds its modules whose plain names are taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.package = _HIDDEN + sha256(str(path).encode()).hexdigest()[:12]

    def has(self, name: str) -> bool:
        package = self.path / name
        if (self.path / f"{name}.py").is_file() or (package / "__init__.py").is_file():
            return True
        return package.is_dir() and any(package.glob("*.py"))

    def open(self) -> None:
        if self.package not in sys.modules:
            module = ModuleType(self.package, f"User code in {self.path}.")
            module.__path__ = [str(self.path)]
            sys.modules[self.package] = module


_lock = threading.RLock()
_folders: dict[Path, _Folder] = {}
_folder_of_file: dict[str, _Folder | None] = {}
_plain_import = builtins.__import__
_plain_import_module = importlib.import_module


def claim_our_names() -> None:
    """Make the plain names ours, even where a script's folder stands before us on `sys.path`.

    A user's module that was imported under one of our names before keeps working: it moves into its folder's hidden
    package, which its folder's code goes on getting.
    """
    with _lock:
        for name in OUR_NAMES:
            present = sys.modules.get(name)
            if present is not None and is_ours(_file_of(present)):
                continue
            if present is not None:
                _move_away(name, present)
            _load_ours(name)
        for entry in list(sys.path):
            folder = Path(entry or Path.cwd()).resolve()
            if folder != OUR_ROOT and any(_shadows(folder, name) for name in OUR_NAMES):
                register(folder)


def register(folder: Path) -> None:
    """From now on code in `folder` gets the folder's own modules first, whatever their names."""
    with _lock:
        folder = folder.resolve()
        if folder in _folders or folder == OUR_ROOT:
            return
        _folders[folder] = _Folder(folder)
        _folder_of_file.clear()
        others = [other for other in _folders.values() if other.path != folder]
        if any(_shadows(folder, name) for name in OUR_NAMES) or others:
            _folders[folder].open()
            for other in others:
                other.open()
            builtins.__import__ = _import
            importlib.import_module = _import_module


def hidden_name(folder: Path, name: str) -> str | None:
    """The name under which `folder`'s module `name` is loaded when its plain name is taken, else None."""
    with _lock:
        known = _folders.get(folder.resolve())
        if known is None or not known.has(name):
            return None
        taken = sys.modules.get(name)
        if name in OUR_NAMES and not is_ours(known.path / name / "__init__.py"):
            known.open()
            return f"{known.package}.{name}"
        if name not in sys.stdlib_module_names and taken is not None and not _inside(_file_of(taken), known.path):
            known.open()
            return f"{known.package}.{name}"
        return None


def _load_ours(name: str) -> None:
    spec = importlib.machinery.PathFinder.find_spec(name, [str(OUR_ROOT)])
    if spec is None or spec.loader is None:
        return  # a part that is not installed; its import will say so
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _move_away(name: str, module: ModuleType) -> None:
    file = _file_of(module)
    if file is None:
        return
    folder = file.parent.parent if file.name == "__init__.py" else file.parent
    known = _folders.setdefault(folder.resolve(), _Folder(folder.resolve()))
    _folder_of_file.clear()
    known.open()
    for key in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        sys.modules[f"{known.package}.{key}"] = sys.modules.pop(key)
    setattr(sys.modules[known.package], name, module)
    builtins.__import__ = _import
    importlib.import_module = _import_module


def _shadows(folder: Path, name: str) -> bool:
    return ((folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()) and not is_ours(
        folder / name / "__init__.py"
    )


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    if file is None and getattr(module, "__path__", None):
        file = str(Path(next(iter(module.__path__))) / "__init__.py")
    return Path(file) if file else None


def _inside(file: Path | None, folder: Path) -> bool:
    return file is not None and (file.is_relative_to(folder) or file.resolve().is_relative_to(folder))


def is_ours(file: Path | None) -> bool:
    return file is not None and any(_inside(file, ours) for ours in _OURS)


def _folder_of(importer: Mapping[str, Any]) -> _Folder | None:
    """The user folder that the importing code belongs to; None for ours, installed packages and Python's own."""
    name = importer.get("__name__") or ""
    if name.startswith(_HIDDEN):
        package = name.partition(".")[0]
        return next((folder for folder in _folders.values() if folder.package == package), None)
    file = importer.get("__file__") or (str(Path.cwd() / "-") if name == "__main__" else None)
    if file is None:
        return None
    if file not in _folder_of_file:
        path = Path(file).resolve()
        around = [folder for folder in _folders.values() if path.is_relative_to(folder.path)]
        nearest = max(around, key=lambda folder: len(folder.path.parts), default=None)
        _folder_of_file[file] = None if is_ours(path) else nearest
    return _folder_of_file[file]


def _instead(name: str, importer: Mapping[str, Any]) -> str | None:
    """The hidden top-level name for what this importer means by `name`, if it is not the plain one."""
    top = name.partition(".")[0]
    if top not in OUR_NAMES and (top not in sys.modules or len(_folders) < 2):
        return None
    folder = _folder_of(importer)
    return hidden_name(folder.path, top) if folder is not None else None


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """`builtins.__import__` that looks at who asks."""
    hidden = _instead(name, globals) if level == 0 and globals is not None else None
    if hidden is None:
        return _plain_import(name, globals, locals, fromlist or (), level)
    full = f"{hidden}{name[len(name.partition('.')[0]) :]}"
    if fromlist:
        return _plain_import(full, globals, locals, fromlist, 0)
    _plain_import_module(full)
    return sys.modules[hidden]


def _import_module(name: str, package: str | None = None) -> ModuleType:
    """`importlib.import_module` that looks at who asks."""
    hidden = _instead(name, sys._getframe(1).f_globals) if not name.startswith(".") else None
    if hidden is None:
        return _plain_import_module(name, package)
    return _plain_import_module(f"{hidden}{name[len(name.partition('.')[0]) :]}")
