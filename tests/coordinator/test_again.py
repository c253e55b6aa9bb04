"""Jobs that are submitted anew with other settings, from what the coordinator has."""

from __future__ import annotations

from typing import Any

import pytest
from coordinator_cases import FakeWorker, Server


async def test_a_job_runs_again_with_other_settings_from_the_start_or_from_a_checkpoint(server: Server) -> None:
    async with FakeWorker(server, "a"):
        first = await server.submit(checkpoint={"every": 3})
        await server.until_state(first["id"], "done")
        home = f"/api/v1/jobs/{first['id']}"
        _, settings = await server.call("GET", f"{home}/settings")
        assert settings["train"]["steps"] == 6
        assert "model" not in settings
        settings["train"]["steps"], settings["name"] = 9, "longer"
        status, longer = await server.call("POST", f"{home}/again", json={"settings": settings})
        assert (status, longer["name"], longer["step"], longer["steps"]) == (201, "longer", 0, 9)
        status, onward = await server.call("POST", f"{home}/again", json={"settings": settings, "after": 3})
        assert (status, onward["step"]) == (201, 3)
        for job in (longer, onward):
            assert (await server.until_state(job["id"], "done"))["step"] == 9
        jobs = server.engine.lifecycle.jobs
        assert jobs[longer["id"]].dag == jobs[first["id"]].dag == jobs[onward["id"]].dag
        # What went on from a checkpoint has no start of its own.
        status, answer = await server.call("POST", f"/api/v1/jobs/{onward['id']}/again", json={"settings": settings})
        assert (status, "went on from a checkpoint" in answer["error"]) == (400, True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": {"steps": 0, "global_batch": 8}}, "settings.train.steps"),
        ({"train": {"steps": 6, "global_batch": 8, "micro_batch": 8}}, "captured for micro-batches of 4"),
        (
            {"train": {"steps": 6, "global_batch": 8, "micro_batch": 4, "precision": "bfloat16"}},
            "is part of the captured",
        ),
        ({"plan": {"fragments": 99}}, "has only"),
        ({"model": {"entrypoint": "x.py:y"}}, "settings.model"),
        ({"name": "../x"}, "settings.name"),
    ],
)
async def test_what_can_not_be_changed_is_told(server: Server, change: dict[str, Any], words: str) -> None:
    job = await server.submit()
    _, settings = await server.call("GET", f"/api/v1/jobs/{job['id']}/settings")
    status, answer = await server.call("POST", f"/api/v1/jobs/{job['id']}/again", json={"settings": settings | change})
    assert status == 400
    assert words in answer["error"]
    assert len(server.engine.lifecycle.jobs) == 1


async def test_a_checkpoint_that_is_not_there_is_told(server: Server) -> None:
    job = await server.submit()
    _, settings = await server.call("GET", f"/api/v1/jobs/{job['id']}/settings")
    status, answer = await server.call(
        "POST", f"/api/v1/jobs/{job['id']}/again", json={"settings": settings, "after": 4}
    )
    assert (status, answer["error"]) == (400, f"no checkpoint {job['id']}@4: it has none")
