"""`fusion job ID --timeline`: a trace file that Perfetto opens, or one line that says why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback_server import as_json, serving

from fusion.cli import main

SPAN = {"worker": "a", "fragment": 0, "micro_batch": 1, "step": 9, "sender": None}
TIMELINE: dict[str, Any] = {
    "origin": 100.0,
    "steps": [{"step": 9, "epoch": 0, "begin": 0.0, "end": 0.6}],
    "workers": ["a", "b"],
    "spans": [
        {**SPAN, "kind": "forward", "begin": 0.0, "end": 0.25},
        {**SPAN, "kind": "activation", "worker": "b", "begin": 0.25, "end": 0.35, "sender": "a"},
    ],
    "shares": [],
    "bubble": 0.5,
}


@pytest.fixture
def ask() -> Callable[[dict[str, Any], Path], int]:
    def run(timeline: dict[str, Any], target: Path) -> int:
        def routes(method: str, path: str, body: bytes, headers: dict[str, str]) -> Any:
            return as_json(timeline if path == "/api/v1/jobs/j-1/timeline" else {"id": "j-1"})

        with serving(routes) as url, pytest.raises(SystemExit) as ended:
            main(["job", "j-1", "--timeline", str(target), "--coordinator", url, "--token", "t"])
        return int(ended.value.code or 0)

    return run


def test_the_trace_has_a_process_for_each_worker_and_times_in_microseconds(
    ask: Callable[[dict[str, Any], Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "trace.json"
    assert ask(TIMELINE, target) == 0
    assert "wrote step 9 to" in capsys.readouterr().out
    events = json.loads(target.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    [task] = [event for event in events if event["ph"] == "X"]
    assert (names[task["pid"]], task["name"], task["ts"], task["dur"]) == ("a", "F 1 of fragment 0", 0.0, 250_000.0)
    begin, end = (event for event in events if event["ph"] in "be")
    assert (names[begin["pid"]], begin["args"]["sender"], begin["id"]) == ("b", "a", end["id"])
    assert (begin["ts"], end["ts"]) == (250_000.0, 350_000.0)


def test_several_steps_are_steps(
    ask: Callable[[dict[str, Any], Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        ask({**TIMELINE, "steps": [{**TIMELINE["steps"][0], "step": step} for step in (8, 9)]}, tmp_path / "two") == 0
    )
    assert "wrote steps 8 and 9 to" in capsys.readouterr().out


def test_without_a_traced_step_one_line_says_so(
    ask: Callable[[dict[str, Any], Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask({**TIMELINE, "steps": [], "spans": []}, tmp_path / "trace.json") != 0
    said = capsys.readouterr().err.strip()
    assert "no step of this job has been traced" in said
    assert "\n" not in said
    assert not (tmp_path / "trace.json").exists()


def test_a_file_that_cant_be_written_is_named(
    ask: Callable[[dict[str, Any], Path], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(TIMELINE, tmp_path / "nowhere" / "trace.json") != 0
    assert "nowhere/trace.json: can't write the timeline" in capsys.readouterr().err
