"""Jobs from submission to the end, with fake workers over real ZeroMQ and a real HTTP server."""

from __future__ import annotations

import asyncio
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from coordinator_cases import FakeWorker, Server, serving
from safetensors.numpy import load

from coordinator.life.events import ClockTicked
from coordinator.storage.tensorfile import StoredTensor, read_header
from fusion.messages import Backup, Failure, FragmentTimes, Leaving, PeerLost, Prepare, Shutdown, StepReport


async def test_a_job_trains_on_two_workers(server: Server) -> None:
    async with FakeWorker(server, "a"), FakeWorker(server, "b"):
        job = await server.submit(plan={"workers": 2}, train={"eval_every": 2}, checkpoint={"every": 2, "keep": 2})
        done = await server.until_state(job["id"], "done")
        assert done["workers"] == ["a", "b"]
        assert (done["step"], done["steps"], done["first_loss"], done["loss"]) == (6, 6, 1.0, 1 / 6)
        assert done["checkpoint"] == 6
        assert [fragment["worker"] for fragment in done["fragments"]] == ["a", "b"]
        assert done["fragments"][0]["first_module"] == "first"
        _, metrics = await server.call("GET", f"/api/v1/jobs/{job['id']}/metrics")
        assert [item["step"] for item in metrics["metrics"]] == [1, 2, 3, 4, 5, 6]
        assert all(item["sent_bytes"] == 200 and item["samples"] == 8 for item in metrics["metrics"])
        assert [item.get("eval_loss") for item in metrics["metrics"]] == [None, 1.0, None, 0.5, None, 1 / 3]
        _, later = await server.call("GET", f"/api/v1/jobs/{job['id']}/metrics?after=4")
        assert [item["step"] for item in later["metrics"]] == [5, 6]
        _, events = await server.call("GET", f"/api/v1/jobs/{job['id']}/events")
        kinds = [item["event"] for item in events["events"]]
        assert [kind for kind in kinds if kind != "queued"][:3] == ["submitted", "planned", "started"]
        assert kinds[-1] == "done"
        _, listed = await server.call("GET", f"/api/v1/jobs/{job['id']}/checkpoints")
        assert [item["step"] for item in listed["checkpoints"]] == [4, 6]
        _, workers = await server.call("GET", "/api/v1/workers")
        assert [item["state"] for item in workers["workers"]] == ["idle", "idle"]


async def test_a_checkpoint_has_every_key_of_the_state_dict_and_nothing_else(server: Server) -> None:
    async with FakeWorker(server, "a"):
        job = await server.submit()
        await server.until_state(job["id"], "done")
        status, model = await server.call("GET", f"/api/v1/jobs/{job['id']}/checkpoints/6/model.safetensors", None)
        assert status == 200
        # numpy has no bfloat16: the unused entry is looked at in test_checkpoints.
        header = model[8 : 8 + int.from_bytes(model[:8], "little")].decode()
        for key in ("first.weight", "second.weight", "head.weight", "unused.half"):
            assert f'"{key}"' in header
        assert "shift" not in header
        assert "scale" not in header
        _, optimizer = await server.call("GET", f"/api/v1/jobs/{job['id']}/checkpoints/6/optimizer.safetensors")
        assert np.array_equal(load(optimizer)["optimizer/exp_avg/first.weight"], [[6, 0], [0, 0]])


async def test_jobs_queue_and_run_side_by_side(server: Server) -> None:
    async with FakeWorker(server, "a") as a, FakeWorker(server, "b") as b:
        a.pause_after = b.pause_after = 2
        first = await server.submit(plan={"workers": 1})
        second = await server.submit(plan={"workers": 1})
        third = await server.submit(plan={"workers": 1})
        one = await server.until(first["id"], lambda job: job["step"] == 2)
        two = await server.until(second["id"], lambda job: job["step"] == 2)
        assert {*one["workers"], *two["workers"]} == {"a", "b"}
        waiting = await server.job(third["id"])
        assert waiting["state"] == "queued"
        assert "all 2 workers are busy" in waiting["reason"]
        status, cancelled = await server.call("POST", f"/api/v1/jobs/{first['id']}/cancel")
        assert (status, cancelled["state"]) == (200, "cancelled")
        assert (await server.until_state(third["id"], "running"))["workers"] == one["workers"]


async def test_a_pool_that_is_too_small_is_told_in_words(server: Server) -> None:
    job = await server.submit(plan={"workers": 2})
    assert "the pool is empty" in (await server.job(job["id"]))["reason"]
    async with FakeWorker(server, "a"):
        shown = await server.until(job["id"], lambda shown: "the pool has 1" in shown["reason"])
        assert "start 1 more" in shown["reason"]
        async with FakeWorker(server, "b"):
            await server.until_state(job["id"], "done")


async def test_a_model_that_does_not_fit_waits_for_memory(server: Server) -> None:
    async with FakeWorker(server, "small", memory=10):
        job = await server.submit()
        shown = await server.until(job["id"], lambda shown: "needs" in shown["reason"])
        assert shown["state"] == "queued"
        assert "small has 4 B" in shown["reason"]  # Of its 10 its process takes 5, and a fifth more when it trains.
        await server.call("POST", "/api/v1/workers/small/drain")
        async with FakeWorker(server, "large"):
            await server.until_state(job["id"], "done")


async def test_a_worker_that_cant_adopt_sends_the_job_back_to_its_checkpoint(server: Server, tmp_path: Path) -> None:
    async with FakeWorker(server, "a") as a:
        b = FakeWorker(server, "b")
        a.cant_adopt = True
        async with b:
            b.pause_after = a.pause_after = 5
            job = await server.submit(checkpoint={"every": 2}, plan={"workers": 2})
            job_weights = server.engine.lifecycle.jobs[job["id"]].weights.digest
            before = await server.until(job["id"], lambda shown: shown["step"] == 5 and shown["checkpoint"] == 4)
            a.pause_after = None
            await b.die()
            done = await server.until_state(job["id"], "done")
        assert (done["epoch"], done["recoveries"], done["restarts"]) == (2, 1, 1)
        assert done["workers"] == ["a"]
        assert done["plan"]["cuts"] == before["plan"]["cuts"]
        assert [fragment["worker"] for fragment in done["fragments"]] == ["a", "a"]
        _, metrics = await server.call("GET", f"/api/v1/jobs/{job['id']}/metrics")
        assert [(item["step"], item["epoch"]) for item in metrics["metrics"]] == [
            (step, step // 6 * 2) for step in range(1, 7)
        ]
        _, events = await server.call("GET", f"/api/v1/jobs/{job['id']}/events")
        stories = [item["message"] for item in events["events"]]
        assert "worker b lost at step 5 (no heartbeat for 1.0 s)" in stories
        prepare = [message for message in a.received if isinstance(message, Prepare)][-1]
        assert prepare.resume is not None
        assert prepare.resume.step == 4
        # numpy has no bfloat16: look at the one tensor.
        header = read_header(_saved(tmp_path, a.weights))
        assert _floats(header["first.weight"])[0] == 4
        assert _floats(header["constant/shift"]) == [0.5, 0.5]
        blobs, digest = server.engine.blobs, prepare.weights.digest
        assert blobs.size(digest) is not None
        # Made and dropped within milliseconds, it would pass for one that was uploaded again since.
        os.utime(blobs.path(digest), (0.0, 0.0))
        server.engine.archive.collect(time.time() + 100)
        assert blobs.size(digest) is None
        assert blobs.size(job_weights) is not None


def _saved(folder: Path, content: bytes) -> Path:
    path = folder / "saved.safetensors"
    path.write_bytes(content)
    return path


def _floats(tensor: StoredTensor) -> list[float]:
    raw = tensor.path.read_bytes()[tensor.start : tensor.start + tensor.length]
    return list(struct.unpack(f"<{tensor.length // 4}f", raw))


async def test_a_worker_whose_port_refuses_is_replaced_at_once(server: Server) -> None:
    """Its failure timeout is far away; the coordinator finds nobody at its door and lets the holder adopt."""
    async with FakeWorker(server, "a") as a, FakeWorker(server, "c") as c:
        async with FakeWorker(server, "b") as b:
            workers = (a, b, c)
            for worker in workers:
                worker.pause_after = 2
            job = await server.submit(
                train={"steps": 40},
                plan={"workers": 3},
                fault_tolerance={"failure_timeout": 60.0, "backup_every": 4},
            )
            while (shown := await server.job(job["id"]))["common_step"] in (None, 0):
                for worker in workers:
                    worker.pause_after = shown["step"] + 1
                await server.until(job["id"], lambda shown: shown["step"] == a.pause_after)
            placement = shown["plan"]["placement"]
            heir = shown["backups"][str(placement.index("b"))]
        await a.say(PeerLost(job=job["id"], peer="b"))
        for worker in (a, c):
            worker.pause_after = None
        done = await server.until_state(job["id"], "done")
    assert (done["recoveries"], done["restarts"], done["epoch"]) == (1, 0, 1)
    assert done["plan"]["placement"] == [heir if name == "b" else name for name in placement]
    _, metrics = await server.call("GET", f"/api/v1/jobs/{job['id']}/metrics")
    assert [item["step"] for item in metrics["metrics"]] == list(range(1, 41))
    _, events = await server.call("GET", f"/api/v1/jobs/{job['id']}/events")
    stories = [item["message"] for item in events["events"]]
    assert any("worker b lost" in story and "connection closed" in story for story in stories)
    assert any(f"{heir} adopts fragment" in story and "from snapshot of step" in story for story in stories)
    _, page = await server.call("GET", "/metrics")
    assert f'fusion_job_recoveries_total{{job="{job["id"]}",name="tiny"}} 1.0' in page.decode()


async def test_a_lost_worker_that_comes_back_is_told_to_join_again(server: Server) -> None:
    async with FakeWorker(server, "a") as a:
        member = server.engine.lifecycle.pool.of_incarnation(a.incarnation)
        assert member is not None
        member.last_heard -= 100
        server.engine.post(ClockTicked(server.engine.clock()))
        assert member.state == "lost"
        async with asyncio.timeout(10):
            await a.evicted.wait()
        message = a.received[-1]
        assert isinstance(message, Shutdown)
        assert message.evicted


def holding(worker: FakeWorker) -> bool:
    """Whether it was told to hold after some step."""
    return any(isinstance(message, Backup) and message.hold for message in worker.received)


async def test_a_draining_worker_hands_its_fragments_over_and_goes(server: Server) -> None:
    async with FakeWorker(server, "a") as a, FakeWorker(server, "b") as b:
        a.pause_after = b.pause_after = 3
        job = await server.submit(train={"steps": 40}, plan={"workers": 2})
        await server.until(job["id"], lambda shown: shown["step"] == 3)
        await b.say(Leaving(reason="SIGTERM"))
        async with asyncio.timeout(10):
            # Reports make the round due. Once one has heard of the hold, the other one is about to; a step more could be too many.
            while not any(map(holding, (a, b))):
                a.pause_after = b.pause_after = (b.pause_after or 0) + 1
                await server.until(job["id"], lambda shown: shown["step"] == b.pause_after)
            # Both: one that goes on before it has heard of the hold would only have it ordered again.
            await server.until(job["id"], lambda shown: all(map(holding, (a, b))))
        a.pause_after = b.pause_after = None
        done = await server.until_state(job["id"], "done")
        async with asyncio.timeout(10):
            await b.evicted.wait()
        assert isinstance(b.received[-1], Shutdown)
        assert not b.received[-1].evicted
        assert (done["workers"], done["recoveries"], done["restarts"], done["epoch"]) == (["a"], 0, 0, 1)
        _, metrics = await server.call("GET", f"/api/v1/jobs/{job['id']}/metrics")
        assert [item["step"] for item in metrics["metrics"]] == list(range(1, 41))
        assert sum(item["sent_bytes"] for item in metrics["metrics"]) <= 200 * 40  # Nothing was run again.


async def test_a_worker_that_nobody_can_take_over_from_leaves_at_its_next_checkpoint(server: Server) -> None:
    async with FakeWorker(server, "a") as a:
        a.pause_after = 3
        job = await server.submit(checkpoint={"every": 2})
        await server.until(job["id"], lambda shown: shown["step"] == 3 and shown["checkpoint"] == 2)
        await a.say(Leaving(reason="SIGTERM"))
        await server.until(job["id"], lambda shown: shown["state"] == "running")
        a.pause_after = 4
        shown = await server.until_state(job["id"], "queued")
        async with asyncio.timeout(10):
            await a.evicted.wait()
        assert (shown["checkpoint"], shown["restarts"]) == (4, 1)


async def test_a_job_resumes_a_checkpoint_on_other_workers(server: Server) -> None:
    async with FakeWorker(server, "a") as a, FakeWorker(server, "b"):
        first = await server.submit(plan={"workers": 2})
        await server.until_state(first["id"], "done")
        resume = {"checkpoint": f"{first['id']}@6"}
        second = await server.submit(resume, plan={"workers": 1}, train={"steps": 9})
        done = await server.until_state(second["id"], "done")
        assert done["step"] == 9
        _, metrics = await server.call("GET", f"/api/v1/jobs/{second['id']}/metrics")
        assert [item["step"] for item in metrics["metrics"]] == [7, 8, 9]
        prepare = [message for message in a.received if isinstance(message, Prepare)][-1]
        assert prepare.resume is not None
        assert prepare.resume.step == 6
        assert prepare.resume.optimizer is not None
        status, refused = await server.call("POST", "/api/v1/jobs", json=await server.submission(resume))
        assert status == 400
        assert "raise train.steps" in refused["error"]
        missing = {"checkpoint": f"{first['id']}@5"}
        status, refused = await server.call("POST", "/api/v1/jobs", json=await server.submission(missing))
        assert status == 400
        assert "it has 6" in refused["error"]


async def test_a_failure_ends_the_job_and_frees_the_workers(server: Server) -> None:
    async with FakeWorker(server, "a") as a:
        a.pause_after = 1
        job = await server.submit()
        await server.until(job["id"], lambda shown: shown["step"] == 1)
        await a.say(Failure(job=job["id"], epoch=0, message="out of memory", detail="Traceback: ..."))
        failed = await server.until_state(job["id"], "failed")
        assert failed["reason"] == "worker a: out of memory"
        _, logs = await server.call("GET", f"/api/v1/jobs/{job['id']}/logs")
        assert logs["logs"][0]["message"] == "Traceback: ..."
        _, workers = await server.call("GET", "/api/v1/workers")
        assert workers["workers"][0]["state"] == "idle"


async def test_a_running_job_survives_a_restart_of_the_coordinator(tmp_path: Path) -> None:
    state = tmp_path / "state"
    async with serving(state) as server:
        worker = FakeWorker(server, "a")
        await worker.__aenter__()
        worker.pause_after = 3
        job = await server.submit()
        await server.until(job["id"], lambda shown: shown["step"] == 3)
    try:
        async with serving(state) as again:
            shown = await again.job(job["id"])
            assert (shown["state"], shown["step"]) == ("running", 3)
            worker.server = again
            times = [FragmentTimes(fragment=0, forward=0, backward=0, update=0)]
            await worker.say(StepReport(job=job["id"], epoch=0, step=4, fragments=times, loss=0.25))
            shown = await again.until(job["id"], lambda shown: shown["step"] == 4)
            assert shown["epoch"] == 0
            await worker.die()
            shown = await again.until_state(job["id"], "queued")
            assert "the pool is empty" in shown["reason"]
            async with FakeWorker(again, "b"):
                done = await again.until_state(job["id"], "done")
                assert done["epoch"] == 1
            _, metrics = await again.call("GET", f"/api/v1/jobs/{job['id']}/metrics")
            assert [item["step"] for item in metrics["metrics"]] == [1, 2, 3, 4, 5, 6]
    finally:
        await worker.die()


async def test_a_blob_that_another_job_uploads_again_is_not_deleted(server: Server) -> None:
    ref = await server.put(b"equal jobs make equal parts")
    archive, blobs = server.engine.archive, server.engine.blobs
    archive.drop([ref.digest])
    archive.collect()
    assert blobs.size(ref.digest) == ref.size  # Not at once ...
    await server.call("HEAD", f"/api/v1/blobs/{ref.digest}", "join")
    archive.collect(time.time() + 100)
    assert blobs.size(ref.digest) == ref.size  # ... and not when somebody has asked after it since.
    os.utime(blobs.path(ref.digest), (0, 0))
    archive.drop([ref.digest])
    archive.collect(time.time() + 100)
    assert blobs.size(ref.digest) is None


async def test_equal_jobs_run_side_by_side(server: Server) -> None:
    async with FakeWorker(server, "a"), FakeWorker(server, "b"):
        jobs = [await server.submit(plan={"workers": 1}, checkpoint={"every": 1, "keep": 9}) for _ in range(4)]
        for job in jobs:
            await server.until_state(job["id"], "done")
            _, kept = await server.call("GET", f"/api/v1/jobs/{job['id']}/checkpoints")
            assert kept["checkpoints"][-1]["step"] == 6
            _, events = await server.call("GET", f"/api/v1/jobs/{job['id']}/events")
            assert "checkpoint-failed" not in {event["event"] for event in events["events"]}


async def test_a_plan_whose_workers_can_not_be_described_is_a_failure_and_no_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("coordinator.background.candidates", broken)
    async with serving(tmp_path / "state") as server, FakeWorker(server, "a"):
        job = await server.submit()
        ended = await server.until_state(job["id"], "failed")
        assert ended["reason"] == "the scheduler failed: RuntimeError: a defect"
