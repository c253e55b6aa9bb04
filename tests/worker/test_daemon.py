"""The worker as a process: signals, exit codes, and no orphans."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator

import pytest
from fake_coordinator import FakeCoordinator
from worker_cases import Stack, make_case

from fusion.messages import Failure, Heartbeat, Leaving, PeerAddress, Ready, Shutdown, Start, StepReport

MAIN = """
import sys
from worker.daemon import WorkerConfig, run_worker
sys.exit(run_worker(WorkerConfig(join=sys.argv[1], name="p", exit_on_stdin_close=len(sys.argv) > 2)))
"""


@pytest.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    made = FakeCoordinator()
    await made.start()
    yield made
    await made.stop()


async def spawn(url: str, *more: str, stdout: int = PIPE) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", MAIN, url, *more, stdin=PIPE if more else DEVNULL, stdout=stdout, stderr=PIPE
    )


async def train(coordinator: FakeCoordinator) -> None:
    """Have the process train a job that would take for ever."""
    case = make_case(Stack(dropout=0.1), steps=10**6)
    asked = coordinator.joined[0]
    peer = PeerAddress(worker="p", endpoint=asked.data_endpoint, public_key=asked.public_key)
    prepare = case.prepare(("p", "p"), [peer])
    coordinator.blobs.update(case.blobs)
    coordinator.send("p", prepare)
    assert isinstance(await coordinator.message("p", Ready, Failure), Ready)
    coordinator.send("p", Start(job=prepare.job, epoch=0))
    await coordinator.message("p", StepReport)


async def test_sigterm_leaves_in_good_order(coordinator: FakeCoordinator) -> None:
    process = await spawn(coordinator.url)
    await coordinator.message("p", Heartbeat)
    await train(coordinator)
    process.send_signal(signal.SIGTERM)
    assert (await coordinator.message("p", Leaving)).reason == "SIGTERM"
    coordinator.send("p", Shutdown(reason="drained"))
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0
    assert err == b""
    assert b"leaving the pool: drained" in out


async def test_a_second_signal_leaves_at_once(coordinator: FakeCoordinator) -> None:
    process = await spawn(coordinator.url)
    await coordinator.message("p", Heartbeat)
    await train(coordinator)
    process.send_signal(signal.SIGINT)
    await coordinator.message("p", Leaving)
    process.send_signal(signal.SIGINT)
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 128 + signal.SIGINT
    assert b"leaving at once" in out


async def test_a_worker_leaves_when_its_stdin_closes(coordinator: FakeCoordinator) -> None:
    process = await spawn(coordinator.url, "local")
    await coordinator.message("p", Heartbeat)
    await train(coordinator)
    assert process.stdin is not None
    process.stdin.close()
    # The coordinator does not answer; an orphan goes all the same.
    assert await asyncio.wait_for(process.wait(), 30) == 0


async def test_a_refusal_is_one_line_and_exit_code_1(coordinator: FakeCoordinator) -> None:
    process = await spawn(coordinator.url.replace("join-token", "wrong"))
    _, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 1
    lines = err.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: the coordinator at http://127.0.0.1")
    assert "its token is not right" in lines[0]


@pytest.mark.parametrize("reader", ["gone", "stuck"])
async def test_a_worker_whose_lines_nobody_takes_works_and_leaves(coordinator: FakeCoordinator, reader: str) -> None:
    there, here = os.pipe()
    if reader == "gone":
        os.close(there)
    else:
        os.set_blocking(here, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(here, bytes(4096)):
                pass
        os.set_blocking(here, True)
    process = await spawn(coordinator.url, stdout=here)
    os.close(here)
    await coordinator.message("p", Heartbeat)
    await train(coordinator)
    await asyncio.wait_for(coordinator.stop(), 20)  # However often it reports.
    # It has said that the coordinator is lost and is back, and goes on all the same.
    await coordinator.start()
    count = len(coordinator.messages)
    await coordinator.until(lambda: any(isinstance(each, StepReport) for _, each in coordinator.messages[count:]))
    process.send_signal(signal.SIGTERM)
    await coordinator.message("p", Leaving)
    coordinator.send("p", Shutdown(reason="drained"))
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, err) == (0, b"")
    if reader == "stuck":
        os.close(there)
