"""A worker's life with a coordinator that comes, goes, refuses and evicts; in one process, over real sockets."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import pytest
import safetensors.torch
from fake_coordinator import TOKEN, FakeCoordinator
from pool_cases import addresses, end, pool, prepare_for, ready_job, start_job, start_worker
from worker_cases import Stack, make_case

from fusion.errors import CoordinatorError, UserError, VersionError
from fusion.messages import (
    CheckpointPart,
    Connect,
    Failure,
    Finished,
    Heartbeat,
    Leaving,
    PeerAddress,
    ProbeLink,
    Ready,
    Shutdown,
    Start,
    StepReport,
    Stop,
    Warned,
)
from fusion.sockets import key_to_hex, new_keys
from worker import pause, service, whereabouts
from worker.config import WorkerConfig
from worker.jobs import part_uploads
from worker.jobs.backups import Backups
from worker.jobs.fetch import Fetcher
from worker.machine.owner import Owner, Reading
from worker.service import default_name
from worker.transport import neighbours
from worker.transport.mover import Mover
from worker.transport.route import Route


@pytest.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    made = FakeCoordinator()
    await made.start()
    yield made
    await made.stop()


CASE = make_case(Stack(dropout=0.0), steps=6, checkpoint_every=3)


async def test_two_workers_train_a_job_and_upload_their_state(coordinator: FakeCoordinator) -> None:
    async with pool(coordinator, "a", "b"):
        await start_job(coordinator, CASE, ("a", "b"))
        for name in ("a", "b"):
            assert isinstance(await coordinator.message(name, Finished, Failure), Finished)
            assert [report.step for report in coordinator.of(name, StepReport)] == [1, 2, 3, 4, 5, 6]
            parts = coordinator.of(name, CheckpointPart)
            assert [part.step for part in parts] == [3, 6]
            assert any("exp_avg/" in key for key in safetensors.torch.load(coordinator.blobs[parts[0].blob.digest]))
        ready = coordinator.of("a", Ready)[0]
        assert 0 < ready.fetched_bytes < sum(map(len, CASE.blobs.values()))
        assert coordinator.of("b", StepReport)[0].loss is not None
        coordinator.send("a", Stop(job="job-1", reason="done"))
        # The worker is free for the next job.
        coordinator.messages.clear()
        await start_job(coordinator, CASE, ("b", "a"), job="job-2")
        assert isinstance(await coordinator.message("a", Finished, Failure), Finished)


async def test_a_prepare_that_is_said_again_changes_nothing_where_it_had_come(coordinator: FakeCoordinator) -> None:
    async with pool(coordinator, "a") as (a,):
        prepare = prepare_for(coordinator, CASE, ("a",))
        coordinator.send("a", prepare)
        await coordinator.message("a", Ready)
        coordinator.send("a", prepare)
        coordinator.send("a", Start(job="job-1", epoch=prepare.plan.epoch))
        assert isinstance(await coordinator.message("a", Finished, Failure), Finished)
        assert sum("ready in" in line for line in a.said) == 1
        assert len(coordinator.of("a", Ready)) == 1


async def test_training_goes_on_while_the_coordinator_is_away(coordinator: FakeCoordinator) -> None:
    case = make_case(Stack(dropout=0.0), steps=60)
    async with pool(coordinator, "a", "b") as (a, b):
        await start_job(coordinator, case, ("a", "b"))
        await coordinator.message("b", StepReport)
        await coordinator.stop()
        # The workers notice and train on; what they have to say waits.
        await a.said.until("lost the coordinator")
        await b.said.until("training goes on")
        await coordinator.start()
        for name in ("a", "b"):
            await coordinator.until(lambda name=name: len({r.step for r in coordinator.of(name, StepReport)}) == 60)
        losses = {report.step: report.loss for report in coordinator.of("b", StepReport)}
        assert all(losses[step] is not None for step in range(1, 61))
        await a.said.until("the coordinator is back")
        assert len(coordinator.joined) == 2


async def test_a_coordinator_that_starts_again_may_refuse_its_workers_at_first(coordinator: FakeCoordinator) -> None:
    """Without trying again by ourselves this would end in joining anew, and the job would start again."""
    async with pool(coordinator, "a") as (a,):
        await coordinator.stop()
        await a.said.until("lost the coordinator")
        await coordinator.start(knows_its_workers=False)
        await coordinator.refusal()
        coordinator.admit_again()
        await a.said.until("the coordinator is back")
        assert len(coordinator.joined) == 1


async def test_a_worker_that_is_told_to_go_before_it_has_found_the_coordinator_goes_at_once() -> None:
    worker = start_worker("http://no-such-host.invalid:1", "a", profile_seconds=0.01)
    await worker.said.until("can't find a way to the coordinator at no-such-host.invalid")
    worker.service.leave("SIGTERM")
    async with asyncio.timeout(10):
        assert await worker.task == 0


async def test_a_name_server_that_is_silent_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answered = threading.Event(), threading.Event()

    def silent(url: str) -> str:
        asked.set()
        answered.wait(60)
        return "127.0.0.1"

    monkeypatch.setattr(whereabouts, "address_towards", silent)
    worker = start_worker("http://h:1", "a", profile_seconds=0.01)
    try:
        assert await asyncio.to_thread(asked.wait, 60)
        worker.service.leave("SIGTERM")
        async with asyncio.timeout(10):
            assert await worker.task == 0
            # What asyncio.run waits for at the end.
            await asyncio.get_running_loop().shutdown_default_executor()
    finally:
        answered.set()


async def test_an_upload_that_finds_no_room_is_a_warning_and_is_tried_again(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_uploads, "_AGAIN_SECONDS", 0.05)
    coordinator.refuse_uploads = True
    async with pool(coordinator, "a"):
        await start_job(coordinator, CASE, ("a",))
        await coordinator.until(lambda: len(coordinator.of("a", Warned)) == 2)
        await coordinator.until(lambda: len(coordinator.of("a", StepReport)) == 6)
        assert not coordinator.of("a", Finished)
        coordinator.refuse_uploads = False
        assert isinstance(await coordinator.message("a", Finished, Failure), Finished)
        assert (
            "no space left on the coordinator's disk (507); it is tried again" in coordinator.of("a", Warned)[0].message
        )
        assert coordinator.of("a", CheckpointPart)[-1].step == 6


async def test_an_upload_that_fails_is_a_warning_and_training_goes_on(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_uploads, "_AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(part_uploads, "_NO_ROOM_PATIENCE", 0.0)
    coordinator.refuse_uploads = True
    async with pool(coordinator, "a"):
        await start_job(coordinator, CASE, ("a",))
        assert isinstance(await coordinator.message("a", Finished, Failure), Finished)
        assert coordinator.of("a", Warned)[-1].message.endswith(
            "checkpoint at step 6: upload: no space left on the coordinator's disk (507); training goes on"
        )
        assert not coordinator.of("a", CheckpointPart)


async def test_the_last_state_waits_for_a_coordinator_that_is_away(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "Fetcher", partial(Fetcher, attempts=1))
    monkeypatch.setattr(part_uploads, "_AGAIN_SECONDS", 0.05)
    case = make_case(Stack(dropout=0.0), steps=60, checkpoint_every=20)
    async with pool(coordinator, "a", "b") as (a, b):
        await start_job(coordinator, case, ("a", "b"))
        await coordinator.message("b", StepReport)
        await coordinator.stop()
        await a.said.until("training goes on")
        await b.said.until("training goes on")
        parts = len(coordinator.of("a", CheckpointPart))
        await coordinator.start()
        for name in ("a", "b"):
            assert isinstance(await coordinator.message(name, Finished, Failure), Finished)
            assert coordinator.of(name, CheckpointPart)[-1].step == 60
            assert coordinator.of(name, CheckpointPart)[-1].blob.digest in coordinator.blobs
            assert not coordinator.of(name, Warned)
        assert len(coordinator.of("a", CheckpointPart)) > parts


async def test_who_is_to_leave_while_the_coordinator_is_away_waits_for_it(coordinator: FakeCoordinator) -> None:
    async with pool(coordinator, "a", "b") as (a, _):
        await start_job(coordinator, make_case(Stack(dropout=0.0), steps=5000), ("a", "b"))
        await coordinator.message("a", StepReport)
        await coordinator.stop()
        await a.said.until("training goes on")
        a.service.leave("SIGTERM")
        await a.said.until("waiting for the coordinator for 20")
        await coordinator.start()
        assert (await coordinator.message("a", Leaving)).reason == "SIGTERM"
        assert not a.task.done()
        coordinator.send("a", Shutdown(reason="drained"))
        assert await asyncio.wait_for(a.task, 20) == 0


async def test_who_leaves_without_the_coordinator_says_so_and_is_no_success(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_AWAY_PATIENCE", 0.1)
    async with pool(coordinator, "a", "b") as (a, _):
        await start_job(coordinator, make_case(Stack(dropout=0.0), steps=5000), ("a", "b"))
        await coordinator.message("a", StepReport)
        a.service.leave("SIGTERM")
        await coordinator.message("a", Leaving)
        await coordinator.stop()
        assert await asyncio.wait_for(a.task, 20) == 1
        assert "its fragments have not moved" in a.said[-1]


async def test_an_evicted_worker_joins_anew(coordinator: FakeCoordinator) -> None:
    async with pool(coordinator, "a", "b"):
        await start_job(coordinator, make_case(Stack(dropout=0.0), steps=500), ("a", "b"))
        await coordinator.message("a", StepReport)
        first = coordinator.incarnations["a"]
        coordinator.send("a", Shutdown(reason="declared lost; join again", evicted=True))
        await coordinator.until(lambda: coordinator.incarnations["a"] != first)
        await coordinator.message("a", Heartbeat)
        coordinator.send("b", Stop(job="job-1", reason="a was lost"))
        # The job starts again under the next epoch.
        coordinator.messages.clear()
        await start_job(coordinator, CASE, ("b", "a"), epoch=1)
        finished = await coordinator.message("a", Finished, Failure)
        assert isinstance(finished, Finished)
        assert finished.epoch == 1


async def test_who_is_told_twice_that_it_was_evicted_joins_anew_once(coordinator: FakeCoordinator) -> None:
    """The second word was for the incarnation that is over; followed, it would end the one that has just begun."""
    async with pool(coordinator, "a") as (a,):
        for _ in range(2):
            a.service._messages.put_nowait(Shutdown(reason="declared lost; join again", evicted=True))
        await coordinator.until(lambda: len(coordinator.joined) == 2)
        await coordinator.message("a", Heartbeat)
        coordinator.send("a", Shutdown(reason="drained"))
        assert await asyncio.wait_for(a.task, 20) == 0
        assert len(coordinator.joined) == 2


async def test_who_is_forgotten_joins_anew(coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_FORGOTTEN_AFTER", 0.0)
    async with pool(coordinator, "a") as (a,):
        await coordinator.stop()
        await a.said.until("lost the coordinator")
        await coordinator.start(knows_its_workers=False)
        await a.said.until("has forgotten this worker")
        await coordinator.until(lambda: len(coordinator.joined) == 2)
        await coordinator.message("a", Heartbeat)


async def test_a_new_plan_replaces_the_one_that_runs(coordinator: FakeCoordinator) -> None:
    async with pool(coordinator, "a", "b"):
        await start_job(coordinator, make_case(Stack(dropout=0.0), steps=5000), ("a", "b"))
        await coordinator.message("a", StepReport)
        coordinator.messages.clear()
        await start_job(coordinator, CASE, ("a", "b", "a"), epoch=1)
        finished = await coordinator.message("a", Finished, Failure)
        assert isinstance(finished, Finished)
        assert {report.epoch for report in coordinator.of("a", StepReport)} >= {1}


async def test_what_can_not_be_built_is_a_failure_in_one_line(coordinator: FakeCoordinator) -> None:
    async with pool(coordinator, "a"):
        prepare = prepare_for(coordinator, CASE, ("a",))
        await coordinator.message("a", Ready)
        broken = prepare.model_copy(update={"dag": CASE.add(b"garbage"), "job": "job-3"})
        coordinator.blobs.update(CASE.blobs)
        coordinator.send("a", broken)
        failure = await coordinator.message("a", Failure)
        assert failure.job == "job-3"
        assert "OP-DAG" in failure.message
        missing = prepare.model_copy(update={"job": "job-4"})
        coordinator.blobs.clear()
        coordinator.messages.clear()
        coordinator.send("a", missing)
        failure = await coordinator.message("a", Failure)
        assert "no such blob (404)" in failure.message


async def test_peers_of_a_job_that_could_not_be_built_are_let_in_no_more(coordinator: FakeCoordinator) -> None:
    async with pool(coordinator, "a", "b") as (a, _):
        prepare = CASE.prepare(("a", "b"), peers := addresses(coordinator, "a", "b"))
        coordinator.send("a", prepare)
        await coordinator.message("a", Failure)  # Nothing was uploaded.
        keys, gate = {peer.worker: peer.public_key for peer in peers}, a.service._mover._gate
        assert gate.admits("data", keys["b"])
        coordinator.send("a", Stop(job="job-1", reason="failed"))
        await a.said.until("job job-1: failed")
        coordinator.send("a", Shutdown(reason="drained"))
        await a.task
        assert not gate.admits("data", keys["b"])


async def test_who_is_told_to_go_while_it_downloads_goes_at_once(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloading = asyncio.Event()

    async def never(*_: Any) -> bytes:
        downloading.set()
        await asyncio.Event().wait()
        return b""

    monkeypatch.setattr(Fetcher, "whole", never)
    async with pool(coordinator, "a") as (a,):
        prepare_for(coordinator, CASE, ("a",))
        await downloading.wait()
        coordinator.send("a", Shutdown(reason="drained"))
        async with asyncio.timeout(10):
            assert await a.task == 0
        assert not coordinator.of("a", Failure)


async def test_an_order_that_can_not_be_followed_is_a_failure(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pool(coordinator, "a", "b"):
        await ready_job(coordinator, CASE, ("a",))

        def broken(*_: Any, **__: Any) -> None:
            raise OSError("too many open files")

        monkeypatch.setattr(Mover, "connect", broken)
        coordinator.send("a", Connect(job="job-1", peers=addresses(coordinator, "b")))
        failure = await coordinator.message("a", Failure)
        assert failure.message == "OSError: too many open files"
        assert "in broken" in failure.detail


async def test_what_fails_beside_the_orders_is_a_failure_too(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Backups) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(Backups, "poke", broken)
    async with pool(coordinator, "a"):
        await ready_job(coordinator, CASE, ("a",))
        failure = await coordinator.message("a", Failure)
        assert (failure.job, failure.message) == ("job-1", "OSError: too many open files")


async def test_a_probe_that_fails_for_a_defect_is_told_in_the_log(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    logged: queue.SimpleQueue[str] = queue.SimpleQueue()
    monkeypatch.setattr(
        logging.getLogger("fusion.worker"), "error", lambda *words, **_: logged.put(words[0] % words[1:])
    )
    monkeypatch.setattr(neighbours, "measure_link", broken)
    async with pool(coordinator, "a"):
        stranger = PeerAddress(worker="b", endpoint="tcp://127.0.0.1:1", public_key=new_keys().public)
        coordinator.send("a", ProbeLink(peer=stranger, max_bytes=1, seconds=1.0))
        assert "probe of the link to b failed" in await asyncio.to_thread(logged.get, timeout=20)


async def test_a_job_that_is_dropped_while_it_connects_leaves_no_connection(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect, close_route = Mover.connect, Mover.close_route
    done: list[str] = []
    connecting = asyncio.Event()
    loop = asyncio.get_running_loop()

    def noted(mover: Mover, route: Route, peers: Sequence[PeerAddress], **options: Any) -> None:
        if peers:
            loop.call_soon_threadsafe(connecting.set)
        connect(mover, route, peers, **options)
        if peers:
            done.append("connect")

    def closed(mover: Mover, route: Route) -> None:
        done.append("close")
        close_route(mover, route)

    monkeypatch.setattr(Mover, "connect", noted)
    monkeypatch.setattr(Mover, "close_route", closed)
    async with pool(coordinator, "a", "b"):
        await ready_job(coordinator, CASE, ("a",))
        # Of a job that `b` knows nothing of: it refuses.
        coordinator.send("a", Connect(job="job-1", peers=addresses(coordinator, "b")))
        await connecting.wait()
        coordinator.send("a", Stop(job="job-1", reason="cancelled"))
        await coordinator.until(lambda: bool(done) and done[-1] == "close")
        assert done == ["connect", "close"]


async def test_leaving_is_said_and_waits_for_the_word(coordinator: FakeCoordinator) -> None:
    async with pool(coordinator, "a") as (a,):
        a.service.leave("SIGTERM")
        a.service.leave("SIGTERM")
        leaving = await coordinator.message("a", Leaving)
        assert leaving.reason == "SIGTERM"
        assert not a.task.done()
        coordinator.send("a", Shutdown(reason="drained"))
        assert await a.task == 0
        assert len(coordinator.of("a", Leaving)) == 1


async def test_who_leaves_and_is_given_up_meanwhile_does_not_join_anew(coordinator: FakeCoordinator) -> None:
    async with pool(coordinator, "a") as (a,):
        a.service.leave("SIGTERM")
        await coordinator.message("a", Leaving)
        coordinator.send("a", Shutdown(reason="declared lost; join again", evicted=True))
        assert await asyncio.wait_for(a.task, 20) == 0
        assert len(coordinator.joined) == 1


@pytest.mark.parametrize(
    ("refuse", "error", "message"),
    [
        ((401, "wrong token"), CoordinatorError, "its token is not right; use the join command"),
        ((409, "a worker named a is in the pool"), CoordinatorError, "a worker named a is in the pool"),
        ((426, "speaks 1, this 2"), VersionError, "speaks 1, this 2"),
        ((200, "no"), CoordinatorError, "is no Fusion coordinator"),
    ],
)
async def test_a_refused_join_ends_with_one_line(
    coordinator: FakeCoordinator, refuse: tuple[int, str], error: type[Exception], message: str
) -> None:
    coordinator.refuse = refuse
    worker = start_worker(coordinator.url, "a")
    with pytest.raises(error, match=message) as raised:
        await worker.task
    assert "\n" not in str(raised.value)


async def test_a_worker_whose_name_will_soon_be_free_asks_again(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.refuse, coordinator.retry_after = (409, "a worker named a is in the pool, but silent"), "1"
    worker = start_worker(coordinator.url, "a")
    await worker.said.until("is in the pool, but silent")
    coordinator.refuse = None
    await coordinator.message("a", Heartbeat)
    assert sum("but silent" in line for line in worker.said) == 1
    await end(worker)


async def test_a_worker_waits_for_a_coordinator_that_is_not_up_yet(coordinator: FakeCoordinator) -> None:
    url = coordinator.url
    await coordinator.stop()
    worker = start_worker(url, "a")
    assert "trying again in 1 s" in await worker.said.until("can't reach the coordinator")
    await coordinator.start()
    await coordinator.message("a", Heartbeat)
    await end(worker)


async def test_leaving_before_joining_ends_at_once() -> None:
    worker = start_worker("http://127.0.0.1:1?token=x", "a")
    await worker.said.until("can't reach the coordinator")
    worker.service.leave("SIGINT")
    assert await asyncio.wait_for(worker.task, 20) == 0


async def test_a_worker_says_what_others_will_use_and_that_its_clock_is_wrong(coordinator: FakeCoordinator) -> None:
    coordinator.ahead = 3600.0
    async with pool(coordinator, "a") as (a,):
        line = await a.said.until("others will use")
        endpoint = coordinator.joined[0].data_endpoint.removeprefix("tcp://")
        assert line == f"others will use {endpoint} (the coordinator is on this machine)"
        warned = await coordinator.message("a", Warned)
        assert "behind the coordinator's" in warned.message
        assert warned.message in a.said


async def test_another_coordinator_than_the_join_command_says_will_not_do(coordinator: FakeCoordinator) -> None:
    worker = start_worker(f"{coordinator.url}&key={key_to_hex(new_keys().public)}", "a")
    with pytest.raises(CoordinatorError, match="another key than the join command says"):
        await worker.task


def test_the_join_url_carries_the_token() -> None:
    config = WorkerConfig(join=f"http://host:8000?token={TOKEN}", token="other")
    assert (config.coordinator, config.bearer) == ("http://host:8000", TOKEN)
    bare = WorkerConfig(join="host:8000", token="other", advertise="[fe80::1]:99")
    assert (bare.coordinator, bare.bearer, bare.advertised) == ("http://host:8000", "other", ("fe80::1", 99))
    with pytest.raises(UserError, match="is not a coordinator's address"):
        _ = WorkerConfig(join="ftp://host").coordinator
    for wrong in ("host", "host:²", "tcp://host:99", "host/x:99"):
        with pytest.raises(UserError, match="is not HOST:PORT"):
            _ = WorkerConfig(join="host", advertise=wrong).advertised
    assert default_name()


class Machine:
    """Every look at the processor is ten seconds after the last one; `others` cores are taken by other programs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.others, self._looks = 8.0, 0
        monkeypatch.setattr(pause, "reading", self._reading)
        monkeypatch.setattr(pause, "Owner", lambda cores: Owner(8))
        monkeypatch.setattr(pause, "_LOOK_SECONDS", 0.01)

    def _reading(self) -> Reading:
        self._looks += 1
        return Reading(10.0 * self._looks, 10.0 * self._looks * self.others, 0.0)

    def calm_down(self) -> None:
        self.others, self._looks = 0.0, self._looks + 1000


async def test_a_worker_gives_a_busy_machine_back_and_joins_again(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    worker = start_worker(coordinator.url, "a", pause_when_busy=True)
    try:
        left = await coordinator.message("a", Leaving)
        assert left.reason == "other programs take 100% of this machine"
        coordinator.send("a", Shutdown(reason="its fragments have moved"))
        await worker.said.until("leaving the pool until they are quiet")
        assert len(coordinator.joined) == 1
        machine.calm_down()
        await coordinator.until(lambda: len(coordinator.joined) == 2)
        await worker.said.until("the machine is quiet again")
        # The patience of the first time is none of the next.
        await coordinator.until(lambda: len(coordinator.of("a", Heartbeat)) > 1)
        assert worker.service._pause._patience is not None
        assert worker.service._pause._patience.cancelled()
    finally:
        await end(worker)


async def test_that_a_machine_is_busy_is_said_again_to_a_coordinator_that_comes_back(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The word may have been lost with the connection, and the owner would wait for the machine for ever."""
    Machine(monkeypatch)
    worker = start_worker(coordinator.url, "a", pause_when_busy=True)
    try:
        await coordinator.message("a", Leaving)
        first = worker.service._pause._patience
        await coordinator.stop()
        await worker.said.until("lost the coordinator")
        coordinator.messages.clear()
        await coordinator.start()
        await coordinator.message("a", Leaving)
        assert first is not None
        assert first.cancelled()
    finally:
        await end(worker)


async def test_a_busy_machine_that_the_coordinator_has_forgotten_does_not_join_before_it_is_quiet(
    coordinator: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch)
    monkeypatch.setattr(service, "_FORGOTTEN_AFTER", 0.0)
    worker = start_worker(coordinator.url, "a", pause_when_busy=True)
    try:
        await coordinator.message("a", Leaving)
        await coordinator.stop()
        await worker.said.until("lost the coordinator")
        await coordinator.start(knows_its_workers=False)
        await coordinator.refusal()
        machine.calm_down()
        await worker.said.until("the machine is quiet again")
        await coordinator.until(lambda: len(coordinator.joined) == 2)
        assert not [line for line in worker.said if "joining anew" in line]
    finally:
        await end(worker)
