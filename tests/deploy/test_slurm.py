"""The Slurm script is a valid script whose commands and settings are ours, and does with stand-ins what its page says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from command_lines import DEPLOY, known_variables, variables_in
from typer.testing import CliRunner

from fusion.cli import app

SCRIPT = DEPLOY / "slurm" / "fusion.sbatch"


def test_bash_takes_it_and_its_settings_are_ours() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert variables_in(SCRIPT.read_text()) <= known_variables()


def test_its_commands_have_the_options_that_it_gives() -> None:
    calls = re.findall(r"\bfusion (coordinator|worker|workers|jobs|logs|submit)\b([^\n|&>2]*)", SCRIPT.read_text())
    assert {name for name, _ in calls} == {"coordinator", "worker", "workers", "jobs", "logs", "submit"}
    for name, rest in calls:
        page = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in page, f"{name} {option}"
        assert "TOKEN" not in rest


FUSION = """#!/bin/bash
# Stands in for `fusion`: notes what it is called with and what it is told by signals.
echo "$1 ${*:2}" >> "$NOTES"
case "$1" in
  coordinator|worker)
    trap 'echo "$1 ends" >> "$NOTES"; exit 0' TERM
    [ "$1" = coordinator ] && { echo join-secret > "$FUSION_STATE/join.token"; echo '{}' > "$FUSION_STATE/client.json"; }
    [ "$1" = worker ] && echo "worker has token $FUSION_TOKEN for $FUSION_JOIN" >> "$NOTES"
    while :; do /bin/sleep 0.02; done ;;
  jobs) echo "$JOBS" ;;
  submit|logs) until grep -q "^worker has" "$NOTES"; do /bin/sleep 0.02; done; exit "$STATUS" ;;
esac
"""
OTHERS = {"srun": 'exec "${@:2}"', "sleep": "exec /bin/sleep 0.05", "hostname": "echo node-1"}


def run_script(folder: Path, jobs: str, status: int) -> tuple[int, list[str]]:
    """The script with stand-ins for `fusion` and for what a cluster has; its exit status and what was noted."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name, text in {"fusion": FUSION, **{name: f"#!/bin/bash\n{text}\n" for name, text in OTHERS.items()}}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    notes = folder / "notes"
    done = subprocess.run(
        ["bash", SCRIPT, "job.yaml"],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "NOTES": str(notes),
            "JOBS": jobs,
            "STATUS": str(status),
            "FUSION_STATE": str(folder / "state"),
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr, done.stderr
    return done.returncode, notes.read_text().splitlines()


def test_a_job_is_submitted_and_the_workers_leave_before_the_coordinator(tmp_path: Path) -> None:
    status, notes = run_script(tmp_path, "[]", 3)
    assert status == 3  # That of the job.
    assert "submit job.yaml --follow" in notes
    assert "worker has token join-secret for http://node-1:8760" in notes
    assert notes[-2:] == ["worker ends", "coordinator ends"]
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_job_that_an_earlier_allocation_left_is_followed_instead(tmp_path: Path) -> None:
    jobs = '[{"id": "old-1", "state": "done"}, {"id": "gpt-2", "state": "queued"}]'
    status, notes = run_script(tmp_path, jobs, 0)
    assert status == 0
    assert "logs gpt-2 --follow" in notes
    assert not [line for line in notes if line.startswith("submit")]
