"""The control channel's coordinator side: what ends it is told, and who is gone leaves little behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from coordinator_cases import FakeWorker, serving

from coordinator import control as module
from coordinator.control import DOMAIN, Control
from fusion.errors import ServiceError
from fusion.messages import Device, JoinRequest, Stop
from fusion.sockets import new_keys
from fusion.wire import PROTOCOL_VERSION


async def test_a_coordinator_that_hears_nothing_any_more_leaves_it_to_a_fresh_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("bad descriptor")

    async def until_it_fails() -> None:
        async with serving(tmp_path / "state") as server, FakeWorker(server, "a"):
            monkeypatch.setattr(Control, "_take", broken)
            async with asyncio.timeout(20):
                await server.engine.failing.wait()
            monkeypatch.undo()

    with pytest.raises(ServiceError, match="can't hear its workers any more: OSError: bad descriptor; start it again"):
        await until_it_fails()


async def test_whose_name_another_process_has_taken_is_gone(tmp_path: Path) -> None:
    def asked() -> JoinRequest:
        return JoinRequest(
            name="a",
            protocol_version=PROTOCOL_VERSION,
            fusion_version="0",
            torch_version="2",
            device=Device(),
            data_endpoint="tcp://127.0.0.1:1",
            public_key=new_keys().public,
        )

    async with serving(tmp_path / "state") as server:
        before = server.engine.join(asked())
        before.last_heard -= server.engine.lifecycle.failure_timeout(before) / 2
        now = server.engine.join(asked())
        assert server.engine.lifecycle.pool.get("a") is now
        assert list(server.control._gone) == [before.incarnation]


async def test_who_is_gone_is_known_for_a_while_and_then_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GONE", 2)
    control = Control(new_keys(), lambda *_: None)
    keys = {f"i{number}": f"{number}" * 40 for number in range(4)}
    for incarnation, key in keys.items():
        control.admit(key, incarnation)
        control.send(incarnation, Stop(job="job", reason="over"))
        control._routes[incarnation] = b"route"
    for incarnation in ("i0", "i1", "i2"):
        control.forget(incarnation)
    known = {incarnation for incarnation, key in keys.items() if control._gatekeeper.admits(DOMAIN, key)}
    assert known == {"i1", "i2", "i3"}
    for kept in (control._incarnations.values(), control._routes, control._keys):
        assert set(kept) == known
    assert set(control._waiting) == {"i3"}
    # The same process joins anew: nothing is sent to what it was, and it is gone no more.
    control.admit(keys["i1"], "i4")
    assert set(control._routes) == {"i2", "i3"}
    control.forget("i3")
    assert control._gatekeeper.admits(DOMAIN, keys["i1"])
    assert control._gatekeeper.admits(DOMAIN, keys["i2"])
    control._context.destroy(0)
