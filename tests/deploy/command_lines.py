"""Holds a command line and its environment against our own commands, without running them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fusion.cli import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def parsed(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings that `fusion ARGUMENTS` would run with. Raises click's usage error, with `Required` among them."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command: Any = typer.main.get_command(app)
    context = command.make_context("fusion", list(arguments))
    _, chosen, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    settings: dict[str, Any] = chosen.make_context(chosen.name, rest, parent=context).params
    return settings


def known_variables() -> set[str]:
    """Every environment variable that some command reads."""
    names = {"FUSION_CONFIG_DIR"}

    def visit(command: Any) -> None:
        for parameter in command.params:
            names.update([parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or ())
        for child in getattr(command, "commands", {}).values():
            visit(child)

    visit(typer.main.get_command(app))
    return names


def variables_in(text: str) -> set[str]:
    """`FUSION_...` names that a file sets or reads."""
    return set(re.findall(r"\bFUSION_[A-Z_]+\b", text))
