"""A coordinator under a small load, and killed under it: benchmarks/coordinator.py as a test of what it counts, not of its times."""

from __future__ import annotations

import asyncio

from benchmarks.coordinator import Load, measure

LOAD = Load(workers=40, viewers=5, crew=10, jobs=2, step_seconds=0.1, warm_up=0.2, seconds=0.5, pin=False)


def test_nothing_that_was_told_is_missing_after_a_kill_and_nobody_is_lost() -> None:
    found = asyncio.run(measure(LOAD))
    assert found["problems"] == []
    assert found["refused_reads"] == 0
    assert found["lost_after_kill"] == []
    assert found["jobs_with_gaps"] == []
    assert found["told_events"] >= LOAD.workers, "everybody's joining is an event"
    assert found["told_steps"] >= LOAD.jobs
    assert found["heartbeats"]["count"] >= LOAD.workers
    assert found["reports"]["count"] >= LOAD.jobs * LOAD.crew
    assert found["reads"]["count"] >= 1
