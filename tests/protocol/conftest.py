"""What all schedules and scenarios have in common."""

from __future__ import annotations

import pytest

from coordinator.life import moves, standby


@pytest.fixture(autouse=True)
def _short_jobs_have_workers_that_stand_by_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(standby, "_SECONDS_LEFT", 0.0)


@pytest.fixture(autouse=True)
def _short_jobs_move_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "_STEPS_BETWEEN", 2)
