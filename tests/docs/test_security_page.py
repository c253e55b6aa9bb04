"""Every claim of docs/security.md names tests, and those tests exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ") and not re.match(r"\| (claim|it can't) \|", line)]


@cache
def names_in(path: str) -> set[str]:
    """Names of the test functions in a file; those of parametrised tests too."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[2:60])
def test_a_claim_names_tests_that_exist(row: str) -> None:
    claim, tests = (cell.strip() for cell in row.strip("|").rsplit("|", 1))
    assert claim
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests)
    assert named
    assert not re.sub(r"`tests/[\w/]+\.py::test_\w+`", "", tests).strip(", "), "something else beside the tests"
    for path, name in named:
        assert name in names_in(path), f"{path} has no {name}"


def test_the_page_says_what_each_opponent_can_do_as_well() -> None:
    assert len(ROWS) > 25
    for opponent in ("network", "stranger", "worker", "submitter"):
        section = re.split(
            r"^## ", TEXT.split(f"## A {'hostile ' if opponent != 'stranger' else ''}{opponent}")[1], flags=re.M
        )[0]
        assert "It **can**" in section
