"""Every command that README and docs show is run here or by another test, or is checked word by word for a stated reason."""

from __future__ import annotations

import ast
import asyncio
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main
from coordinator_cases import FakeWorker, serving
from shown_commands import ROOT, fusion_arguments, shell_blocks, shown_commands, words
from typer.core import TyperGroup

from fusion.cli import app, main
from fusion.messages import StepReport, StepTrace, ToCoordinator

COMMANDS = shown_commands()

AGAINST_A_POOL = r"fusion (jobs|job|logs|workers|drain|checkpoint|token|top --once)\b.*"
ALONE = r"fusion (dag|plan) .*"
IN_A_SHELL = r"(openssl req|umask|printf 'FUSION_TOKEN) ?.*"

ELSEWHERE = {
    r"fusion up job\.yaml --workers 3 --state run .*": "tests/docs/test_tutorial.py::test_the_tutorial",
    r"fusion up job\.yaml --workers 3": "tests/docs/test_tutorial.py::test_the_tutorial",
    r"fusion up .*--chaos.*": "tests/fusion/test_chaos.py",
    r"fusion up .*--topology.*": "tests/fusion/test_local.py",
    r"fusion up": "tests/fusion/test_local.py",
    r"fusion submit .*": "tests/fusion/test_local.py",
    r"fusion coordinator\b.*": "tests/coordinator/test_coordinator_daemon.py",
    r"fusion worker\b.*": "tests/worker/test_daemon.py",
    r"fusion top": "tests/fusion/test_top.py",
}
"""Run, with arguments of their own, by these tests: they take processes, or a terminal."""

NOT_RUN = {
    r"make (demo|test|develop|check|format)": "makes an environment, or runs what runs this",
    r"\.venv/bin/pre-commit install": "changes the checkout",
    r"(sudo )?python3 -m venv .*": "makes an environment",
    r"\. \.venv/bin/activate": "changes the shell that it is given in",
    r"(sudo )?(\.venv/bin/|/opt/fusion/bin/)?pip install .*": "installs packages",
    r"(sudo )?\.venv/bin/python benchmarks/.*": "takes minutes; some need root",
    r"\.venv/bin/fusion plan examples/paper_scale/.*": "plans for minutes; tests/fusion/test_examples.py reads its files",
    r"export FUSION_\w+=.*": "sets what the commands after it are given here",
    r"sudo install .*": "needs root",
    r"echo .* \| sudo tee .*": "needs root",
    r"sudo cp .*": "needs root",
    r"sudo systemctl .*": "needs root and systemd; tests/deploy/test_systemd.py starts the units' commands",
    r"docker compose .*": "needs docker; tests/deploy/test_containers.py reads the files",
    r"sbatch .*": "needs Slurm; tests/deploy/test_slurm.py runs the script with a stand-in",
    r"kubectl .*": "needs a cluster; tests/deploy/test_kubernetes.py reads the manifests",
}
"""Why a command is only checked for what it names: options, targets, files."""

NAMED_LATER = {"deploy/.env"}
"""Files that a command makes."""


def matching(command: str) -> list[str]:
    found = [pattern for pattern in (AGAINST_A_POOL, ALONE, IN_A_SHELL, *NOT_RUN) if re.fullmatch(pattern, command)]
    plain = command.removeprefix(".venv/bin/")
    return found or [pattern for pattern in ELSEWHERE if re.fullmatch(pattern, plain)][:1]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_run_or_there_is_a_reason_why_not(command: str) -> None:
    assert len(matching(command)) == 1, "add it to what is run, or to a list with its reason"


def test_the_lists_name_nothing_that_is_gone() -> None:
    used = {pattern for command in COMMANDS for pattern in matching(command)}
    assert used >= {*ELSEWHERE, *NOT_RUN}
    for place in ELSEWHERE.values():
        path, _, name = place.partition("::")
        assert f"def {name or 'test_'}" in (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize(("place", "text"), shell_blocks())
def test_a_block_is_shell(place: str, text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{place}: {done.stderr}"


@pytest.mark.parametrize("command", [command for command in COMMANDS if fusion_arguments(command) is not None])
def test_the_command_line_takes_it(command: str) -> None:
    """By the parser itself: unknown options, missing arguments and bad values fail."""
    arguments, parser = fusion_arguments(command) or [], typer.main.get_command(app)
    while isinstance(parser, TyperGroup):
        assert arguments, f"{command}: which command?"
        assert arguments[0] in parser.commands, f"{command}: no command {arguments[0]}"
        parser, arguments = parser.commands[arguments[0]], arguments[1:]
    parser.make_context("fusion", list(arguments))


def test_the_parser_refuses_what_it_does_not_know() -> None:
    with pytest.raises(Exception, match="No such option: --wrokers"):
        test_the_command_line_takes_it("fusion up --wrokers 3")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_it_names_exists(command: str) -> None:
    """Targets of the Makefile, files of the repository, options of the benchmarks."""
    program, *rest = words(command)
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for word in rest:
        if re.match(r"(deploy|benchmarks|examples|tests)/", word) and word not in NAMED_LATER:
            assert (ROOT / word).exists(), word
    if program == "python" and rest[0].startswith("benchmarks/"):
        known = options_of(ROOT / rest[0])
        assert [word for word in rest[1:] if word.startswith("--") and word not in known] == []


def options_of(script: Path) -> set[str]:
    """Options that a script adds to its parser, and those that every benchmark has if it begins with them."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = {
        str(word.value)
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for word in call.args
        if isinstance(word, ast.Constant)
    }
    common = ROOT / "benchmarks" / "common.py"
    begins = any(isinstance(call.func, ast.Name) and call.func.id == "arguments" for call in calls)
    return found | (options_of(common) if begins and script != common else set())


# Run ------------------------------------------------------------------------------------------------------------------


@dataclass
class Pool:
    """A coordinator with two workers, a job that is done, and a token that may be revoked."""

    url: str
    token: str
    job: str
    revocable: str

    def words(self, arguments: list[str]) -> list[str]:
        """What a person puts in the place of what is shown."""
        own = {"ID": self.job, "WORKER": "lima-1", "1a2b3c4d": self.revocable}
        return [own.get(word, word).replace("s3://", "memory://") for word in arguments]


class Traced(FakeWorker):
    """Says when the tasks of its steps ran."""

    async def say(self, message: ToCoordinator) -> None:
        if isinstance(message, StepReport):
            trace = StepTrace(begun=1.0, told=2.0, tasks=[("forward", 0, 0, 0.1, 0.2)])
            message = message.model_copy(update={"trace": trace})
        await super().say(message)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """It lives on a thread of its own, because commands wait for its answers."""
    ready, over, found, failed = threading.Event(), threading.Event(), [], []

    async def serve() -> None:
        async with (
            serving(tmp_path_factory.mktemp("pool") / "state") as server,
            Traced(server, "oslo-1"),
            Traced(server, "lima-1"),
        ):
            job = await server.submit(plan={"workers": 1})
            await server.until_state(job["id"], "done")
            _, made = await server.call("POST", "/api/v1/tokens", json={"role": "viewer"})
            found.append(Pool(server.url, server.access.operator_token, job["id"], made["id"]))
            ready.set()
            await asyncio.to_thread(over.wait)

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        assert found, failed
        yield found[0]
    finally:
        over.set()
        thread.join()
    assert not failed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is given: with nothing of the person's own settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUSION_CONFIG_DIR", str(tmp_path / "config"))
    return tmp_path


def succeed(capsys: pytest.CaptureFixture[str], folder: Path, arguments: list[str]) -> None:
    """It ends well, and has said something or written the file that it was asked for."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert not ended.value.code, err
    named = [arguments[at + 1] for at, word in enumerate(arguments) if word in ("-o", "--timeline")]
    written = [name for name in named if "://" not in name]
    assert out.strip() or named
    assert all((folder / name).stat().st_size for name in written)


@pytest.mark.parametrize("command", [command for command in COMMANDS if re.fullmatch(AGAINST_A_POOL, command)])
def test_it_works_on_a_pool(
    command: str, pool: Pool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSION_COORDINATOR", pool.url)
    monkeypatch.setenv("FUSION_TOKEN", pool.token)
    arguments = pool.words(fusion_arguments(command) or [])
    succeed(capsys, folder, arguments)


MODEL = """
from torch import nn
def build(): return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
def data():
    import torch
    return torch.utils.data.TensorDataset(torch.zeros(8, 4), torch.zeros(8, dtype=torch.long))
"""
JOB = {
    "name": "small",
    "model": {"entrypoint": "model.py:build"},
    "loss": "cross_entropy",
    "data": {"entrypoint": "model.py:data"},
    "train": {"steps": 1, "global_batch": 8, "micro_batch": 4},
}
TOPOLOGY = {
    "workers": [{"name": name, "region": name, "speed": 1e9, "memory": "4GiB"} for name in ("oslo", "lima")],
    "links": [{"between": ["oslo", "lima"], "bandwidth": "16Mbit/s", "latency": "90ms"}],
}


@pytest.mark.parametrize("command", [command for command in COMMANDS if re.fullmatch(ALONE, command)])
def test_it_works_on_a_job(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.py").write_text(MODEL)
    (folder / "job.yaml").write_text(json.dumps(JOB))  # YAML takes JSON.
    for name in ("pool.yaml", "cities.yaml"):
        (folder / name).write_text(json.dumps(TOPOLOGY))
    succeed(capsys, folder, fusion_arguments(command) or [])


def test_the_shell_commands_work(folder: Path) -> None:
    (folder / "deploy").mkdir()
    for command in (command for command in COMMANDS if re.fullmatch(IN_A_SHELL, command)):
        done = subprocess.run(["bash", "-c", command], env={**os.environ}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (folder / "cert.pem").exists()
    secrets = dict(line.split("=") for line in (folder / "deploy" / ".env").read_text().splitlines())
    assert {name: len(secret) for name, secret in secrets.items()} == {"FUSION_TOKEN": 48, "FUSION_JOIN_TOKEN": 48}
