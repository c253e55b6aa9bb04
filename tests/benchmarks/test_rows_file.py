"""Results files that several processes fill."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rows_file import RowsFile


def test_rows_that_another_process_wrote_meanwhile_stay(tmp_path: Path) -> None:
    path = tmp_path / "results" / "rows.json"
    first, second = RowsFile(path, {"steps": 300}), RowsFile(path, {"steps": 300})
    first.add("a", {"loss": 1.0})
    second.add("b", {"loss": 2.0})
    first.add("a", {"loss": 3.0})
    assert {name: first[name]["loss"] for name in first} == {"a": 3.0, "b": 2.0}
    again = RowsFile(path, {"steps": 300})
    assert {name: again[name]["loss"] for name in again} == {"a": 3.0, "b": 2.0}


def test_rows_made_under_other_conditions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    RowsFile(path, {"steps": 300}).add("a", {"loss": 1.0})
    with pytest.raises(SystemExit, match=r"its rows were made with steps 300, these would be with 20; move it away"):
        RowsFile(path, {"steps": 20})
