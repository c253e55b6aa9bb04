"""The daemon as a process: what it prints, how it ends, and what it says when it can't start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import sys
from pathlib import Path

import aiohttp
import pytest
import zmq
import zmq.asyncio
from coordinator_cases import FakeWorker, Server

from fusion.messages import Heartbeat, encode
from fusion.sockets import key_to_hex, new_keys, secure_client

_RUN = """
import sys
from pathlib import Path
from coordinator import CoordinatorConfig, run_coordinator
code = run_coordinator(CoordinatorConfig(state=Path(sys.argv[1]), port=int(sys.argv[2]),
    json_ready="json" in sys.argv, exit_on_stdin_close="stdin" in sys.argv))
assert "torch" not in sys.modules
sys.exit(code)
"""


async def _start(state: Path, port: int, *flags: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _RUN,
        str(state),
        str(port),
        *flags,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "FUSION_CONFIG_DIR": str(state / "config"), "PYTHONUNBUFFERED": "1"},
    )


async def _ready(process: asyncio.subprocess.Process) -> dict[str, str]:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        ready: dict[str, str] = json.loads(await process.stdout.readline())
    return ready


async def test_one_json_line_tells_a_program_everything(tmp_path: Path) -> None:
    process = await _start(tmp_path / "state", 0, "json")
    ready = await _ready(process)
    assert set(ready) == {"url", "join_url", "token", "control_endpoint"}
    assert ready["url"].startswith("http://127.0.0.1:")
    async with aiohttp.ClientSession() as session, session.get(ready["url"] + "/healthz") as answer:
        assert (await answer.json())["status"] == "ok"
    for name in ("operator.token", "join.token", "control.keys", "client.json"):
        assert stat.S_IMODE((tmp_path / "state" / name).stat().st_mode) == 0o600
    another = await _start(tmp_path / "state", 0, "json")
    _, errors = await another.communicate()
    assert another.returncode == 1
    assert b"another coordinator uses" in errors
    process.send_signal(signal.SIGINT)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")
    # The same secrets and the same control port after a restart, so that workers find it again.
    process = await _start(tmp_path / "state", 0, "json", "stdin")
    again = await _ready(process)
    assert (again["token"], again["control_endpoint"]) == (ready["token"], ready["control_endpoint"])
    assert process.stdin is not None
    process.stdin.close()
    async with asyncio.timeout(20):
        assert await process.wait() == 0


async def test_a_person_is_told_how_to_join(tmp_path: Path) -> None:
    process = await _start(tmp_path / "state", 0)
    assert process.stdout is not None
    text = ""
    async with asyncio.timeout(60):
        while "Ctrl-C" not in text:
            text += (await process.stdout.readline()).decode()
    token = (tmp_path / "state" / "join.token").read_text().strip()
    url = text.split("coordinator at ")[1].split()[0]
    public = json.loads((tmp_path / "state" / "control.keys").read_text())["public"]
    assert f"fusion worker --join '{url}?token={token}&key={key_to_hex(public)}'" in text
    assert f"{url}/" in text
    written = json.loads((tmp_path / "state" / "config" / "coordinator.json").read_text())
    assert written["url"] == url
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        assert await process.wait() == 0


async def test_a_port_in_use_is_one_clear_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await _start(tmp_path / "state", port)
        output, errors = await process.communicate()
    assert process.returncode == 1
    assert output == b""
    assert errors.decode().splitlines() == [
        f"error: port {port} on 127.0.0.1 is in use; take another --port, or stop the program there"
    ]


async def test_a_key_that_did_not_join_gets_no_word_in(server: Server) -> None:
    async with FakeWorker(server, "a") as worker:
        refused = asyncio.Event()
        loop = asyncio.get_running_loop()
        gatekeeper = server.control._gatekeeper
        gatekeeper._on_refused = lambda *_: loop.call_soon_threadsafe(refused.set)
        context = zmq.asyncio.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        secure_client(stranger, new_keys(), server.control.keys.public)
        stranger.connect(f"tcp://127.0.0.1:{server.control.port}")
        # libzmq drops the connection of a refused client for good: when the refusal is first, the send never ends.
        sending = asyncio.ensure_future(stranger.send(encode(Heartbeat(incarnation=worker.incarnation))))
        async with asyncio.timeout(10):
            await refused.wait()
        sending.cancel()
        stranger.close()
        context.term()
        # And one that did is not believed when its message is nonsense.
        before = server.control.refused
        await worker._socket.send(b"\xc1 not msgpack")
        await worker._socket.send_multipart([b"too", b"many"])
        job = await server.submit()
        await server.until_state(job["id"], "done")
        assert server.control.refused == before + 2


@pytest.mark.parametrize("host", ["256.1.1.1", "192.0.2.77"])
async def test_an_address_that_is_not_ours_is_one_clear_line(host: str) -> None:
    from coordinator.daemon import bind_http
    from fusion.errors import ServiceError

    with pytest.raises(ServiceError, match="can't listen on"):
        bind_http(host, 0)
