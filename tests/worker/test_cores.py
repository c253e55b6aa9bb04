"""Which cores a worker may use, and by what name workers of one machine know that these are the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from worker.machine import cores


def told_by_another_process() -> str:
    program = "from worker.machine import cores; print(cores.shared_by())"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_processes_of_one_machine_know_that_they_share_its_cores() -> None:
    assert cores.shared_by() == told_by_another_process() != ""


def test_all_of_a_machine_have_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = cores.machine()
    assert here == cores.machine() != ""
    monkeypatch.setattr(cores, "_BOOT", tmp_path / "no such file")
    assert cores.machine() == cores.machine() != here


def test_a_gpu_is_shared_apart_from_the_cores() -> None:
    assert cores.shared_by("GPU-1") == cores.shared_by("GPU-1")
    assert len({cores.shared_by(), cores.shared_by("GPU-1"), cores.shared_by("GPU-2")}) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system keeps no process to some cores")
def test_who_is_kept_to_some_cores_has_those() -> None:
    before, shared = os.sched_getaffinity(0), cores.shared_by()
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores.count() == 1
        assert cores.shared_by() == told_by_another_process()
        assert len(before) == 1 or cores.shared_by() != shared
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("text", "wanted"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None), ("?", None)]
)
def test_a_container_s_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, wanted: int | None
) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text(text + "\n")
    monkeypatch.setattr(cores, "_QUOTA", quota)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64)
    monkeypatch.setattr(cores, "_allowed", lambda: list(range(64)))
    assert cores.count() == (wanted or 64)


def test_another_container_s_limit_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    here = []
    for group in (tmp_path, tmp_path.parent):
        monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr(cores, "_GROUP", group)
        here.append(cores.shared_by())
    assert here[0] != here[1]
