"""systemd units: systemd finds nothing wrong with them, their command lines are ours, and they start and drain as processes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_lines import DEPLOY, known_variables, parsed, variables_in

from fusion.client import Client

UNITS = sorted((DEPLOY / "systemd").rglob("*.service"))


def settings_of(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


def command_of(unit: Path, state: str = "/var/lib/fusion") -> list[str]:
    """The unit's command line as this machine can run it."""
    (line,) = settings_of(unit)["ExecStart"]
    words = shlex.split(line)
    assert words[0].endswith("/fusion")
    return [
        sys.executable,
        "-m",
        "fusion",
        *(word.replace("%S/fusion", state).replace("/var/lib/fusion", state) for word in words[1:]),
    ]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.parent.name}/{unit.stem}")
def test_a_unit_starts_on_boot_drains_on_stop_and_takes_secrets_from_a_file(
    unit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, text = settings_of(unit), unit.read_text()
    assert settings["WantedBy"] == ["multi-user.target" if unit.parent.name == "system" else "default.target"]
    assert variables_in(text) <= known_variables()
    assert "token" not in settings["ExecStart"][0]
    assert settings["EnvironmentFile"][0].endswith(".env")
    assert settings["Restart"] == ["on-failure"]
    if "worker" in unit.name:
        assert (settings["KillSignal"], settings["KillMode"]) == (["SIGTERM"], ["mixed"])
        assert int(settings["TimeoutStopSec"][0]) > 90
        monkeypatch.setenv("FUSION_JOIN", "https://h:1?token=x")
    assert parsed(monkeypatch, command_of(unit)[3:], {})["log_format"].value == "json"


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    for kind in ("system", "user"):
        copies = []
        for unit in (unit for unit in UNITS if unit.parent.name == kind):
            (line,) = settings_of(unit)["ExecStart"]
            # The program is not installed where the unit expects it.
            copy = tmp_path / kind / unit.name
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(unit.read_text().replace(line.split()[0], sys.executable))
            copies.append(str(copy))
        scope = ["--user"] if kind == "user" else []
        done = subprocess.run(
            ["systemd-analyze", *scope, "verify", "--man=no", *copies],
            capture_output=True,
            text=True,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            check=False,
        )
        complaints = [line for line in done.stderr.splitlines() if "fusion" in line]
        assert not complaints, complaints


def test_the_units_processes_start_join_drain_and_end_in_order(tmp_path: Path) -> None:
    """What systemd does, without systemd: the command line, the environment file's settings, and SIGTERM."""
    system = DEPLOY / "systemd" / "system"
    state = tmp_path / "state"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FUSION_")}
    environment = {**plain, "FUSION_CONFIG_DIR": str(tmp_path / "config"), "PYTHONWARNINGS": "ignore"}

    def start(unit: str, **more: str) -> subprocess.Popen[str]:
        words = command_of(system / unit, str(state))
        words = [{"8760": "0", "8761": "0"}.get(word, word) for word in words]
        return subprocess.Popen(words, env={**environment, **more}, stderr=subprocess.PIPE, text=True)

    def stop(process: subprocess.Popen[str]) -> list[dict[str, object]]:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return [json.loads(line) for line in errors.splitlines()]

    coordinator = start("fusion-coordinator.service")
    worker = None
    try:
        assert coordinator.stderr is not None
        said = json.loads(coordinator.stderr.readline())
        with Client(said["url"], (state / "operator.token").read_text().strip()) as client:
            token = str(client.create_token("join", 60.0, uses=1)["token"])
            worker = start("fusion-worker.service", FUSION_JOIN=f"{said['url']}?token={token}", FUSION_NAME="unit")
            for item in client.stream(idle_seconds=60):
                if item.kind == "worker" and (item.data["name"], item.data["state"]) == ("unit", "idle"):
                    break
            lines = stop(worker)
            assert any("worker unit joined" in str(line["message"]) for line in lines)
            assert token.partition(".")[2] not in json.dumps(lines)
            assert client.workers() == []
        events = [line.get("event") for line in stop(coordinator)]
        assert "worker-left" in events
    finally:
        for process in (coordinator, worker):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
