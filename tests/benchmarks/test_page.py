"""The tables and plots of docs/benchmarks.md, as made from results."""

from __future__ import annotations

import copy
import re
from pydoc_data import topics
from typing import Any

import pytest
import torch

from benchmarks.page import plots, tables
from benchmarks.page.blocks import filled, table
from benchmarks.slow_rows import Row

PAGE = """# Page
<!-- made by benchmarks/publish.py: one -->
old
<!-- end -->
By hand.
"""


def test_a_block_is_made_again_and_what_stands_around_it_stays() -> None:
    made = filled(PAGE, {"one": lambda: table(["a", "b"], [["1", "2"]])})
    assert made == PAGE.replace("old", "\n| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    assert filled(made, {"one": lambda: table(["a", "b"], [["1", "2"]])}) == made


@pytest.mark.parametrize("names", [[], ["two"], ["one", "two"]])
def test_a_block_that_nobody_makes_or_shows_is_an_error(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"the page has blocks \['one'\]"):
        filled(PAGE, dict.fromkeys(names, str))


def test_tables_and_plots_follow_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables.prediction(), plots.prediction(), tables.recovery(), tables.recovery("equal"), plots.recovery()
    assert before == (
        tables.prediction(),
        plots.prediction(),
        tables.recovery(),
        tables.recovery("equal"),
        plots.recovery(),
    )
    recorded = tables.recorded

    def changed(name: str) -> Any:
        found = copy.deepcopy(recorded(name))
        if name == "prediction":
            found["settings"][0]["planned"] *= 3
        else:
            found["results"][0]["adoptions"][0]["next_step"] *= 30
        return found

    monkeypatch.setattr(tables, "recorded", changed)
    monkeypatch.setattr(plots, "recorded", changed)
    after = tables.prediction(), plots.prediction(), tables.recovery(), tables.recovery("equal"), plots.recovery()
    assert all(one != other for one, other in zip(before, after, strict=True))


def test_what_differed_in_a_chaos_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {line.split("|")[4].strip() for line in tables.chaos().splitlines()[2:]} == {"0"}
    recorded = tables.recorded

    def changed(name: str) -> Any:
        return (
            {**recorded(name), "wrong": ["the loss of step 3", "weight a.b"]}
            if name == "chaos_resnet"
            else recorded(name)
        )

    monkeypatch.setattr(tables, "recorded", changed)
    assert [line.split("|")[4].strip() for line in tables.chaos().splitlines() if "resnet" in line] == ["2"]


def test_results_are_shown_by_any_python_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tables.losses("gpt")
    # The text that benchmarks train on is the interpreter's own, which is another in each Python.
    monkeypatch.setattr(topics, "topics", {"a": "another text"})
    monkeypatch.setattr(torch, "__version__", "2.13.0+another")
    assert tables.losses("gpt") == before


def test_a_table_has_a_line_for_each_plan_and_a_column_for_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(name: str, setting: str, seconds: float, rounds: tuple[float, ...] = (), sent: int | None = None) -> Row:
        return Row("gpt", setting, name, seconds, seconds, seconds, (), 0, 0.0, sent_bytes=sent, rounds=rounds)

    rows = [
        row("ours: op-fence, dense", "8", 0.5, (0.4, 0.5, 0.75), sent=3 * 2**20),
        row("torch, grouped", "8", 4.0),
        row("torch, grouped", "20", 2.0),
    ]
    monkeypatch.setattr(tables, "measured", lambda settings, models: rows)
    assert tables.slow_table("gpt", ["8", "20", "100"], tables.seconds).splitlines() == [
        "| plan | two cities, 8 Mbit/s | two cities, 20 Mbit/s |",
        "| --- | --- | --- |",
        "| torch, grouped | 4.00 | 2.00 |",
        "| op-fence, dense | 0.50 (0.40 to 0.75) |  |",
    ]
    assert "torch" not in tables.slow_table("gpt", ["8", "20", "100"], tables.sent)


def test_shapes_of_a_plot_are_numbered_and_referred_to_by_number() -> None:
    svg = plots.prediction()
    made, used = (set(re.findall(pattern, svg)) for pattern in (r'id="(shape-\d+)"', r"#(shape-\d+)[\")]"))
    assert used
    assert used <= made
    assert not re.search(r"[0-9a-f]{10}[\")]", svg)
