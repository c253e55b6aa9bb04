"""The control channel's worker side: what is told of it may fail, and neither it nor its end is held up."""

from __future__ import annotations

import asyncio
from time import monotonic, time

import pytest
from fake_coordinator import FakeCoordinator

from fusion.messages import Heartbeat, JoinResponse, Warned
from fusion.sockets import new_keys
from worker.control import Control


def answer(coordinator: FakeCoordinator) -> JoinResponse:
    assert coordinator.control is not None
    return JoinResponse(
        worker="p",
        incarnation="i",
        control_endpoint=f"tcp://127.0.0.1:{coordinator.control.port}",
        control_public_key=coordinator.keys.public,
        heartbeat_seconds=0.1,
        time=time(),
        seen_as="127.0.0.1",
        reachable=True,
    )


@pytest.mark.timeout(60)
async def test_who_hears_of_the_connection_may_fail() -> None:
    coordinator, keys = FakeCoordinator(), new_keys()
    heard: asyncio.Queue[bool] = asyncio.Queue()

    def on_connection(there: bool) -> None:
        heard.put_nowait(there)
        raise OSError("can't say so")

    async def start() -> None:
        await coordinator.start()
        assert coordinator.control is not None
        coordinator.control.admit(keys.public, "i")

    coordinator.incarnations["p"] = "i"
    await start()
    assert coordinator.control is not None
    control = Control(keys, lambda _: None, on_connection)
    control.open(answer(coordinator))
    async with asyncio.timeout(20):
        assert await heard.get()
        await coordinator.stop()
        assert not await heard.get()
        await start()
        assert await heard.get()
    coordinator.messages.clear()
    await coordinator.message("p", Heartbeat)
    # libzmq would block, and the event loop with it, if it had nobody to tell that the monitor ends.
    await control.destroy()
    await coordinator.stop()


@pytest.mark.timeout(60)
async def test_what_ends_the_channel_is_told() -> None:
    """Or a worker would be deaf, or silent, and not know it."""
    coordinator, keys = FakeCoordinator(), new_keys()
    await coordinator.start()
    assert coordinator.control is not None
    coordinator.control.admit(keys.public, "i")
    control = Control(keys, lambda _: None, lambda _: None)

    def no_such_process() -> int:
        raise OSError("no such process")

    control.memory_used = no_such_process
    control.open(answer(coordinator))
    with pytest.raises(OSError, match="no such process"):
        async with asyncio.timeout(20):
            await control.ended()
    await control.destroy()
    await coordinator.stop()


@pytest.mark.timeout(60)
async def test_what_was_said_before_a_long_stop_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by SIGSTOP or a laptop that slept: it may have been lost, and nobody could notice."""
    stopped_for = [0.0]
    monkeypatch.setattr("worker.control.monotonic", lambda: monotonic() + stopped_for[0])
    coordinator, keys = FakeCoordinator(), new_keys()
    connected: asyncio.Queue[bool] = asyncio.Queue()
    coordinator.incarnations["p"] = "i"
    await coordinator.start()
    assert coordinator.control is not None
    coordinator.control.admit(keys.public, "i")
    control = Control(keys, lambda _: None, connected.put_nowait)
    control.open(answer(coordinator))
    async with asyncio.timeout(20):
        assert await connected.get()
        control.send(Warned(message="before"))
        await coordinator.message("p", Warned)
        stopped_for[0] = 60.0
        control.send(Warned(message="after"))
        await coordinator.stop()
        assert not await connected.get()
        coordinator.messages.clear()
        await coordinator.start()
        assert coordinator.control is not None
        coordinator.control.admit(keys.public, "i")
        assert await connected.get()
        again = await coordinator.message("p", Warned)
        assert again.message == "before"
    await control.destroy()
    await coordinator.stop()
