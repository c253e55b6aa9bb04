"""A coordinator with `--log-format json` says everything as JSON on stderr, and none of its secrets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from fusion.client import Client


async def test_every_line_is_json_and_holds_no_secret(tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "fusion", "coordinator", "--host", "0.0.0.0", "--port", "0", "--state", str(state)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "FUSION_CONFIG_DIR": str(tmp_path / "config"), "FUSION_LOG_FORMAT": "json"},
    )
    assert process.stderr is not None
    lines = []
    async with asyncio.timeout(60):
        while not lines or "url" not in lines[-1]:
            lines.append(json.loads(await process.stderr.readline()))
    assert [line["level"] for line in lines] == ["warning", "info"]
    assert "without TLS" in lines[0]["message"]
    port = lines[-1]["url"].rpartition(":")[2]

    def use() -> dict[str, object]:
        with Client(f"http://127.0.0.1:{port}", (state / "operator.token").read_text().strip()) as client:
            return client.create_token("join", 60.0)

    made = await asyncio.to_thread(use)
    assert str(made["join_url"]).startswith(lines[-1]["url"])
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(20):
        out, errors = await process.communicate()
    assert (process.returncode, out) == (0, b"")
    said = json.dumps(lines) + errors.decode()
    secrets = [(state / name).read_text().strip() for name in ("operator.token", "join.token", "viewer.token")]
    secrets += [json.loads((state / "control.keys").read_text())["secret"], str(made["token"]).partition(".")[2]]
    assert not [secret for secret in secrets if secret in said]
