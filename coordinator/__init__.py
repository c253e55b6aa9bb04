"""The coordinator daemon: HTTP API, control channel, job life cycle, store, checkpoints, dashboard. Never imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig as CoordinatorConfig
    from coordinator.daemon import run_coordinator as run_coordinator

__all__ = ["CoordinatorConfig", "run_coordinator"]


def __getattr__(name: str) -> Any:
    if name == "CoordinatorConfig":
        from coordinator.config import CoordinatorConfig

        return CoordinatorConfig
    if name == "run_coordinator":
        from coordinator.daemon import run_coordinator

        return run_coordinator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
