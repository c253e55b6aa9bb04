"""A results file that grows row by row, so that a long benchmark can be stopped at any time and goes on where it was.

Several processes may fill one file, each with rows of its own: what the others have written meanwhile stays.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class RowsFile:
    """Rows by name in a JSON file. `conditions` are what all of its rows were made under.

    Raises `SystemExit`, in a line, for a file that holds rows made under others.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self.path = path
        self._conditions = dict(conditions)
        self._rows = self._read()

    def _read(self) -> dict[str, Row]:
        if not self.path.exists():
            return {}
        found = json.loads(self.path.read_text(encoding="utf-8"))
        for key, value in self._conditions.items():
            if found["conditions"].get(key) != value:
                raise SystemExit(
                    f"error: {self.path}: its rows were made with {key} {found['conditions'].get(key)!r}, these would be with "
                    f"{value!r}; move it away, or give the same"
                )
        rows: dict[str, Row] = found["rows"]
        return rows

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def add(self, name: str, row: Mapping[str, Any]) -> None:
        """Put a row in, in place of one of the same name. It is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.parent):
            self._rows = {**self._rows, **self._read(), name: dict(row)}
            rows = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in self._rows.items())
            text = f'{{\n  "conditions": {json.dumps(self._conditions)},\n  "rows": {{\n{rows}\n  }}\n}}\n'
            beside = self.path.with_suffix(".new")
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, self.path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process writes rows in this folder meanwhile."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
