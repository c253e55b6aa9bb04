"""TLS: what is wrong with a certificate is one line at the start, and clients and workers trust nobody by mistake."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from certificates import make_certificate
from coordinator_cases import Server

from coordinator.config import CoordinatorConfig
from coordinator.entry.announcement import Announcement, goes_to_the_journal, warnings
from coordinator.entry.tls import ServerTls, load_tls
from fusion.client import Client
from fusion.errors import CoordinatorError, UnreachableError, UserError
from fusion.messages import Device, JoinRequest
from fusion.sockets import new_keys
from fusion.tls import client_context, explain
from fusion.wire import PROTOCOL_VERSION
from worker.config import WorkerConfig
from worker.joining import ask, connector

TOKEN = "0123456789-operator"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"), "IP:127.0.0.1", "DNS:pool.example.org", "DNS:*.example.net")


def test_a_certificate_that_can_not_work_is_one_line_at_the_start(pair: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, key = pair
    _, other = make_certificate(tmp_path / "other", "DNS:x")
    locked, rubbish = tmp_path / "locked.pem", tmp_path / "rubbish.pem"
    rubbish.write_text("not PEM")
    subprocess.run(
        ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:word", "-out", locked],
        check=True,
        capture_output=True,
    )
    cases: list[tuple[Path | None, Path | None, str]] = [
        (certificate, None, "--tls-cert needs --tls-key"),
        (None, key, "--tls-key needs --tls-cert"),
        (tmp_path / "none", key, "--tls-cert .*none: can't be read: No such file"),
        (certificate, other, "--tls-key .*: does not belong to the certificate"),
        (certificate, locked, "--tls-key .*: is protected by a passphrase"),
        (rubbish, key, "--tls-cert .*: holds no certificate in PEM form"),
        (certificate, rubbish, "--tls-key .*: holds no private key in PEM form"),
    ]
    for given, its_key, words in cases:
        with pytest.raises(UserError, match=words):
            load_tls(given, its_key)
    assert load_tls(None, None) is None


def test_the_names_of_a_certificate_decide_what_is_announced(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tls = load_tls(*pair)
    assert tls is not None
    assert tls.names == ("127.0.0.1", "pool.example.org", "*.example.net")
    assert not tls.known
    for host, covered in {
        "127.0.0.1": True,
        "POOL.example.org": True,
        "a.example.net": True,
        "a.b.example.net": False,
        "192.0.2.1": False,
    }.items():
        assert tls.covers(host) is covered, host
    named = ServerTls(tls.context, tls.certificate, ("pool.example.org",), tls.fingerprint, tls.known)
    assert named.public_host("192.0.2.1") == "pool.example.org"
    nameless = ServerTls(tls.context, tls.certificate, (), tls.fingerprint, tls.known)
    config = CoordinatorConfig(state=tmp_path, host="192.0.2.1")
    assert "every client will refuse it" in warnings(config, nameless)[0]


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("", True), ("192.0.2.1", True)],
)
def test_listening_beyond_loopback_without_tls_is_warned_of(host: str, warned: bool) -> None:
    lines = warnings(CoordinatorConfig(state=Path("x"), host=host), None)
    assert [line for line in lines if "without TLS" in line and "--tls-cert" in line] == lines
    assert bool(lines) is warned


def test_what_goes_to_the_journal_holds_no_secret(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = Announcement(CoordinatorConfig(state=tmp_path, host="192.0.2.1"), server.access, None, 1, 2)
    secrets = (server.access.join_token, server.access.operator_token, server.access.viewer_token)
    assert not any(secret in line for line in said.for_people(tmp_path, secrets=False) for secret in secrets)
    shown = "\n".join(said.for_people(tmp_path, secrets=True))
    assert f"http://192.0.2.1:1/?token={server.access.viewer_token}" in shown
    assert server.access.operator_token not in shown
    with open(tmp_path / "out", "w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert goes_to_the_journal(stream)
        monkeypatch.setenv("JOURNAL_STREAM", "8:1")
        assert not goes_to_the_journal(stream)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (10, "has expired"),
        (9, "compare the clocks"),
        (62, "not for pool"),
        (64, "not for pool"),
        (20, "--tls-ca FILE"),
        (99, "not accepted"),
    ],
)
def test_a_refused_certificate_is_explained(code: int, words: str) -> None:
    error = ssl.SSLCertVerificationError(1, "x")
    error.verify_code, error.verify_message = code, "reason"
    assert words in explain(error, "pool")


def test_a_useless_file_of_authorities_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rubbish").write_text("x")
    for name in ("none", "rubbish"):
        with pytest.raises(UserError, match=f"--tls-ca .*{name}"):
            client_context(tmp_path / name)


@asynccontextmanager
async def coordinator(state: Path, *flags: str) -> AsyncIterator[tuple[int, str, str]]:
    """A coordinator process; yields its id, what it printed and its URL. It must end in order and say nothing more."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fusion", "coordinator", "--port", "0", "--state", str(state), *flags),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "FUSION_CONFIG_DIR": str(state / "config"), "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    text = ""
    async with asyncio.timeout(60):
        while "Ctrl-C" not in text:
            line = await process.stdout.readline()
            assert line, text
            text += line.decode()
    try:
        yield process.pid, text, text.split("coordinator at ")[1].split()[0]
    finally:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")


async def test_clients_and_workers_join_over_https_and_trust_nobody_else(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    certificate, key = pair
    flags = ("--tls-cert", str(certificate), "--tls-key", str(key), "--token", TOKEN, "--require-token")
    async with coordinator(tmp_path / "state", *flags) as (pid, text, url):
        assert re.fullmatch(r"https://127\.0\.0\.1:\d+", url)
        port = url.rpartition(":")[2]
        line = await asyncio.to_thread(Path(f"/proc/{pid}/cmdline").read_bytes)
        assert TOKEN.encode() not in line
        assert b"--token\0xxxx" in line

        with Client(url, TOKEN, ca=certificate) as client:
            assert await asyncio.to_thread(client.jobs) == []
        left = json.loads((tmp_path / "state" / "config" / "coordinator.json").read_text())
        assert left == {"url": url, "token": TOKEN, "ca": str(certificate)}

        async def refused(address: str, **kwargs: Any) -> str:
            with pytest.raises(UnreachableError) as caught, Client(address, TOKEN, **kwargs) as stranger:
                await asyncio.to_thread(stranger.jobs)
            assert "\n" not in str(caught.value)
            return str(caught.value)

        assert "give --tls-ca FILE" in await refused(url)
        assert "its certificate is not for localhost" in await refused(f"https://localhost:{port}", ca=certificate)
        assert "use https:// instead of http://" in await refused(f"http://127.0.0.1:{port}")

        join_url = text.split("--join '")[1].split("'")[0]
        assert f"&cert={load_tls(certificate, key).fingerprint}" in join_url  # type: ignore[union-attr]
        request = JoinRequest(
            name="a",
            protocol_version=PROTOCOL_VERSION,
            fusion_version="0",
            torch_version="0",
            device=Device(memory_bytes=0, flops_per_second=1e9),
            data_endpoint="tcp://127.0.0.1:1",
            public_key=new_keys().public,
        )

        async def join(config: WorkerConfig) -> str:
            async with aiohttp.ClientSession(connector=connector(config)) as session:
                return (
                    await ask(session, config.coordinator, config.bearer, request, config.coordinator_key)
                ).answer.worker

        assert await join(WorkerConfig(join_url)) == "a"
        plain = re.sub("&cert=.*", "", join_url)
        assert await join(WorkerConfig(plain, tls_ca=str(certificate))) == "a"
        with pytest.raises(CoordinatorError, match=r"can't trust the coordinator at .*; give --tls-ca FILE"):
            await join(WorkerConfig(plain))
        with pytest.raises(CoordinatorError, match="another certificate than the join command says"):
            await join(WorkerConfig(f"{plain}&cert={'0' * 64}"))
        with pytest.raises(UserError, match=r"cert=12 .*copy the whole join command"):
            await join(WorkerConfig(f"{plain}&cert=12"))
        # A key of its own is what a network that can change what goes over HTTP would hand to a worker.
        other = re.sub("key=[0-9a-f]{64}", f"key={'0' * 64}", join_url)
        assert other != join_url
        with pytest.raises(CoordinatorError, match="another key than the join command says"):
            await join(WorkerConfig(other))
        with pytest.raises(UserError, match=r"key=12 .*copy the whole join command"):
            await join(WorkerConfig(f"{plain.partition('&')[0]}&key=12", tls_ca=str(certificate)))
        with Client(url, TOKEN, ca=certificate) as client:
            invited = (await asyncio.to_thread(client.create_token, "join", None, None, ""))["join_url"]
        assert await join(WorkerConfig(invited)) == "a"


async def test_https_to_a_plain_coordinator_is_explained(server: Server, pair: tuple[Path, Path]) -> None:
    url = server.url.replace("http:", "https:")
    with pytest.raises(UnreachableError, match="use http:// instead of https://"), Client(url, ca=pair[0]) as client:
        await asyncio.to_thread(client.jobs)
