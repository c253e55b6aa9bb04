"""What the installed program writes, and where."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.cli.output import show, table

MODEL = """
from torch import nn

print("imported")


def build():
    print("building")
    return nn.Linear(4, 3)
"""
SPEC = """
name: chatty
model: {entrypoint: model.py:build}
loss: mse
data: {arrays: data.npz}
train: {steps: 2, global_batch: 4}
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fusion", *arguments], capture_output=True, text=True, timeout=120)


def test_without_arguments_it_shows_its_commands() -> None:
    ended = run()
    assert "Traceback" not in ended.stderr
    assert "submit" in ended.stdout + ended.stderr


def test_what_the_users_code_prints_is_no_part_of_the_result(tmp_path: Path) -> None:
    import numpy as np

    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "job.yaml").write_text(SPEC)
    np.savez(tmp_path / "data.npz", inputs=np.ones((8, 4), "float32"), targets=np.ones((8, 3), "float32"))
    ended = run("dag", str(tmp_path / "job.yaml"), "--format", "json")
    assert ended.returncode == 0
    assert json.loads(ended.stdout)
    assert "building" in ended.stderr


COLUMNS = ("name", "state", "endpoint", "modules")
ROWS = [("a-worker-1", "draining", "tcp://127.0.0.1:41795", "embedding of words .. last head"), ("b", "idle", "-", "-")]


def shown(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    show(table(None, COLUMNS, ROWS, least=("endpoint", "state"), folded=("modules",)))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(len(line) for line in lines) <= int(os.environ["COLUMNS"])
    return [re.split(" {3,}", line.strip()) for line in lines]


@pytest.mark.parametrize(
    ("width", "columns"),
    [(100, COLUMNS), (75, COLUMNS), (60, ("name", "state", "modules")), (34, ("name", "modules"))],
)
def test_a_narrow_terminal_s_table_has_fewer_columns_and_whole_words(
    width: int, columns: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    lines = shown(capsys)
    assert tuple(lines[0]) == columns
    assert lines[2][:-1] == [cell for name, cell in zip(COLUMNS, ROWS[0], strict=True) if name in columns[:-1]]


def test_no_column_is_left_out_of_what_goes_to_a_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    wide = [(*row[:3], "x" * 300) for row in ROWS]
    show(table(None, COLUMNS, wide, least=("endpoint", "state")))
    assert "endpoint" in capsys.readouterr().out
