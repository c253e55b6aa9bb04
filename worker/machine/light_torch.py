"""Keeps torch's compiler out of worker processes, which never compile.

Making the first optimizer imports `torch._dynamo`, only to mark functions as not to be compiled. That takes about two
seconds and 70 MB in every worker. A stand-in answers those marks and hands any other request to the real module.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"


class _StandIn(ModuleType):
    def disable(self, function: Any = None, *_: Any, **__: Any) -> Any:
        """Nothing is compiled here, so every function is as good as disabled."""
        return function if function is not None else lambda function: function

    def graph_break(self, *_: Any, **__: Any) -> None:
        """There is no graph to break."""

    def __getattr__(self, name: str) -> Any:
        # `__path__` is asked for when a submodule is imported; that needs the real package.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        return getattr(load_compiler(), name)


def leave_compiler_out() -> None:
    """Put the stand-in where `import torch._dynamo` finds it; does nothing when the compiler is loaded already."""
    import torch

    if _NAME not in sys.modules:
        stand_in = _StandIn(_NAME)
        sys.modules[_NAME] = stand_in
        torch._dynamo = stand_in


def load_compiler() -> ModuleType:
    """The real module, in place of the stand-in."""
    if isinstance(sys.modules.get(_NAME), _StandIn):
        del sys.modules[_NAME]
    return importlib.import_module(_NAME)
