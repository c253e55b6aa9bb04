"""Codecs that shrink tensors for the wire.

`codec("int4")` encodes and decodes; `parse("int4")` only knows sizes and never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compress.places import Places
from compress.rounding import edge_seed
from compress.settings import CODECS, Settings, parse

if TYPE_CHECKING:
    from compress.codecs import Codec, codec
    from compress.feedback import ErrorFeedback

__all__ = ["CODECS", "Codec", "ErrorFeedback", "Places", "Settings", "codec", "edge_seed", "parse"]

_NEED_TORCH = {"Codec": "compress.codecs", "codec": "compress.codecs", "ErrorFeedback": "compress.feedback"}


def __getattr__(name: str) -> Any:
    if name in _NEED_TORCH:
        from importlib import import_module

        return getattr(import_module(_NEED_TORCH[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
