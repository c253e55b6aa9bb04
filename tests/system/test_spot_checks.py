"""Spot checks in real processes: a liar is evicted, and the job ends as if it had not been; honest workers never fail one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cases import all_cases
from runs import captured

from benchmarks.disturbed import Running, differences
from fusion.local import LocalPool, LocalWorker
from fusion.spec import VerifySpec

pytestmark = pytest.mark.system


def test_a_liar_is_evicted_and_leaves_no_trace_and_nobody_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, clipping, evaluation, checkpoints; every task is checked, or none."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    job = captured(
        next(case for case in all_cases() if case.name == "gpt-dropout"),
        tmp_path,
        train={"steps": 14, "clip_grad_norm": 1.0, "eval_every": 8},
        plan={"fragments": 3, "policy": "equal-ops"},
        checkpoint={"every": 4},
        fault_tolerance={"backup_every": 3},
        verify={"fraction": 1.0},
    )
    unchecked = replace(job, spec=job.spec.model_copy(update={"verify": VerifySpec()}))
    workers = [LocalWorker(name) for name in ("cheat-6", "w0", "w1")]
    with LocalPool(tmp_path / "pool", workers, dashboard=False, worker_module="cheating_worker") as pool:
        pool.wait_for_workers()
        lied_to = Running(pool, job).finish(180)
        story = "\n".join(str(event["message"]) for event in lied_to.events)
        assert [event["worker"] for event in lied_to.events if event["event"] == "worker-evicted"] == ["cheat-6"], story
        found = [event for event in lied_to.events if event["event"] == "check-failed"]
        assert {(event["worker"], event["step"]) for event in found} == {("cheat-6", 6)}, story
        assert pool.forget("cheat-6") == 0

        honest, calm = Running(pool, job).finish(180), Running(pool, unchecked).finish(180)
    assert differences(calm, lied_to) == [], story
    assert lied_to.repeated == []
    assert differences(calm, honest) == []
    assert honest.job["checks"]["passed"] > 0, honest.events
    assert (honest.job["checks"]["failed"], honest.count("worker-evicted", "restarted")) == (0, 0)
    assert calm.job["checks"] == {"passed": 0, "failed": 0, "void": 0}
