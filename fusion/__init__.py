"""Fusion trains one PyTorch model over many machines that are far apart, differ in speed, and come and go.

The whole public API stands here; importing it is cheap, torch is loaded by the first name that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fusion.api import Client, TrainResult, capture, train

__all__ = ["Client", "TrainResult", "__version__", "capture", "train"]


def __getattr__(name: str) -> Any:
    if name not in ("Client", "TrainResult", "capture", "train"):
        raise AttributeError(f"module 'fusion' has no attribute {name!r}")
    # A script's folder stands first on the path: its own `worker.py` must not be taken for ours.
    from fusion.import_views import claim_our_names

    claim_our_names()
    from fusion import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
