"""What the installed program writes, and where."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
