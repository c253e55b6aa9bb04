"""The Slurm script is a valid script whose commands and settings are ours, and which puts no token on a command line."""

from __future__ import annotations

import re
import subprocess

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
