"""Loads a job spec from a YAML file or plain data; every problem names its file, line and column."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.spec import JobSpec
from fusion.yaml_file import load_model, validate


def load_spec(path: str | Path) -> JobSpec:
    """Read a job spec. Raises `SpecError` whose first line is the summary when there are several problems."""
    return load_model(Path(path), JobSpec, "job spec (YAML)")


def folder_of(path: Path) -> Path:
    """What the paths in this spec are relative to: its own folder, or the working folder where it comes through a pipe."""
    return path.resolve().parent if path.is_file() else Path.cwd()


def spec_from(data: Mapping[str, Any], where: str = "job spec") -> JobSpec:
    """Validate a job spec that is already plain data. Raises `SpecError`; `where` stands in front of each problem."""
    return validate(JobSpec, data, where=where)
