"""Keeps torch's compiler out of worker processes, which never compile.

Making the first optimizer imports `torch._dynamo`, only to mark functions as not to be compiled, and tensors without data read
two of its settings. All of it would cost every worker time and memory. A stand-in answers the marks, the settings are loaded alone,
and any other request goes to the real package.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"
_SETTINGS = f"{_NAME}.config"


class _StandIn(ModuleType):
    def disable(self, function: Any = None, *_: Any, **__: Any) -> Any:
        """Nothing is compiled here, so every function is as good as disabled."""
        return function if function is not None else lambda function: function

    def graph_break(self, *_: Any, **__: Any) -> None:
        """There is no graph to break."""

    def __getattr__(self, name: str) -> Any:
        # `__path__` is asked for when another submodule is imported; that needs the real package.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(load_compiler(), name)


def leave_compiler_out() -> None:
    """Put the stand-in where `import torch._dynamo` finds it; does nothing when the compiler is loaded already."""
    import torch

    if _NAME in sys.modules:
        return
    stand_in = _StandIn(_NAME)
    sys.modules[_NAME] = stand_in
    torch._dynamo = stand_in
    spec = spec_from_file_location(_SETTINGS, Path(torch.__file__).with_name("_dynamo") / "config.py")
    if spec is not None and spec.loader is not None:
        settings = module_from_spec(spec)
        sys.modules[_SETTINGS] = settings
        spec.loader.exec_module(settings)
        stand_in.config = settings  # type: ignore[attr-defined]


def load_what_jobs_need() -> None:
    """What torch imports when it checks shapes for the first time, a normalization's above all."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        torch.nn.functional.layer_norm(torch.zeros(2, 2), (2,))


def load_compiler() -> ModuleType:
    """The real package, in place of the stand-in."""
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
        sys.modules.pop(_SETTINGS, None)
    return importlib.import_module(_NAME)
