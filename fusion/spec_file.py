"""Loads a job spec from a YAML file or plain data; every problem names its file, line and column."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.spec import JobSpec
from fusion.yaml_file import load_model, place_of, validate

_WHAT = "job spec (YAML)"
_KEY = re.compile(r"([a-z_]+(?:\.[a-z_]+)*)(?:: | )")


def load_spec(path: str | Path) -> JobSpec:
    """Read a job spec. Raises `SpecError` whose first line is the summary when there are several problems."""
    return load_model(Path(path), JobSpec, _WHAT)


def folder_of(path: Path) -> Path:
    """What the paths in this spec are relative to: its own folder, or the working folder where it comes through a pipe."""
    return path.resolve().parent if path.is_file() else Path.cwd()


@contextmanager
def placed(path: Path) -> Iterator[None]:
    """What is found out later than by reading the spec, and begins with one of its keys, says where in the file that stands."""
    try:
        yield
    except UserError as error:
        key = _KEY.match(str(error))
        # What came through a pipe can't be read again.
        place = place_of(path, key[1].split("."), _WHAT) if key is not None and path.is_file() else ""
        if place:
            error.args = (f"{place}: {error}", *error.args[1:])
        raise


def spec_from(data: Mapping[str, Any], where: str = "job spec") -> JobSpec:
    """Validate a job spec that is already plain data. Raises `SpecError`; `where` stands in front of each problem."""
    return validate(JobSpec, data, where=where)
