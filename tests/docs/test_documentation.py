"""What README and docs say is so: examples run or parse, links lead somewhere, generated pages are up to date."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from typer.testing import CliRunner

from fusion import messages
from fusion.cli import app
from fusion.spec import JobSpec
from fusion.topology import Topology
from fusion.wire import PROTOCOL_VERSION, FrameKind

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[tuple[str, str]]:
    """(page and position, content) of every fenced block of a language."""
    return [
        (f"{page.relative_to(ROOT)} block {index}", found[2])
        for page in PAGES
        for index, found in enumerate(FENCE.finditer(page.read_text()))
        if found[1] == language
    ]


def shown_commands() -> list[str]:
    """Every `fusion ...` line in a shell block, and every inline `fusion ...` that carries an option or argument."""
    lines = [line.split("  #")[0].strip() for _, block in blocks("sh") for line in block.splitlines()]
    for page in PAGES:
        lines += re.findall(r"`(fusion [a-z][^`\n]*)`", page.read_text())
    found = {line.removeprefix(".venv/bin/") for line in lines if re.match(r"(\.venv/bin/)?fusion ", line)}
    return sorted(found)


def test_readme_shows_the_example_that_the_tests_run() -> None:
    code = (ROOT / "examples" / "train_in_15_lines.py").read_text().strip()
    assert code in (ROOT / "README.md").read_text()
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_generated_pages_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate_reference.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", shown_commands())
def test_commands_that_are_shown_exist_with_their_options(line: str) -> None:
    """Checks names and options against the command's own help; nothing is run."""
    words = shlex.split(line.split("|")[0].replace("...", ""))[1:]
    path = [words[0]] if not words[0].startswith("-") else []
    if path in (["checkpoint"], ["token"]) and len(words) > 1:
        path.append(words[1])
    answer = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert answer.exit_code == 0, f"{line}: {answer.output}"
    for option in (word.strip("[]").split("=")[0] for word in words if word.strip("[]").startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", answer.output), f"{line}: no option {option}"


@pytest.mark.parametrize(("place", "text"), blocks("yaml"))
def test_specs_that_are_shown_are_valid(place: str, text: str) -> None:
    document = yaml.safe_load(text)
    if "links" in document:
        Topology.model_validate(document)
    else:
        JobSpec.model_validate(document)


@pytest.mark.parametrize(("place", "text"), [*blocks("python")])
def test_python_that_is_shown_compiles(place: str, text: str) -> None:
    compile(text, place, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in headings(file), f"{page.name}: {target}"


def headings(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_messages_and_frames_of_the_protocol_page_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    for union in (messages.ToWorker, messages.ToCoordinator):
        for model in get_args(get_args(union)[0]):
            assert f"| `{model.model_fields['type'].default}` |" in text
    for kind in FrameKind:
        assert f"| {kind.name} |" in text
    assert f"Protocol version {PROTOCOL_VERSION} " in text


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "adr"
    listed = set(re.findall(r"\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text()))
    assert listed == {page.name for page in folder.glob("0*.md")}


def test_the_job_spec_page_names_every_key() -> None:
    text = (ROOT / "docs" / "job-spec.md").read_text()
    schema = json.dumps(JobSpec.model_json_schema())
    for section in json.loads(schema)["$defs"].values():
        for key in section.get("properties", {}):
            assert f"| `{key}` |" in text
