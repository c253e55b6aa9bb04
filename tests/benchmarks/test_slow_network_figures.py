"""What the benchmarks of slow networks make of their measurements: files that grow, curves, bounds and goals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import loss_curves, topologies
from benchmarks.codec_harm import BOUNDARIES, SCRATCH, STARTS, TRIED, cases
from benchmarks.rows_file import RowsFile
from benchmarks.slow_goals import goals
from benchmarks.slow_rows import Row, of_rounds
from benchmarks.slow_settings import DENSE, HEADLINE, SETTINGS, STAGES, VARIANTS


def row(name: str, seconds: float, *, setting: str = "8", uniform: bool = False, link: float | None = None) -> Row:
    return Row(
        "gpt",
        setting,
        name,
        seconds,
        seconds,
        seconds,
        (2.0,),
        0,
        0.0,
        link_seconds=link,
        stage_seconds=link,
        uniform=uniform,
    )


def test_a_results_file_keeps_its_rows_and_refuses_those_of_other_conditions(tmp_path: Path) -> None:
    file = tmp_path / "results" / "losses.json"
    rows = RowsFile(file, {"steps": 3})
    rows.add("one", {"loss": 2.5})
    rows.add("two", {"loss": 1.25})
    rows.add("one", {"loss": 2.0})
    again = RowsFile(file, {"steps": 3})
    assert list(again) == ["one", "two"]
    assert again["one"] == {"loss": 2.0}
    assert json.loads(file.read_text())["conditions"] == {"steps": 3}
    with pytest.raises(SystemExit, match="made with steps 3, these would be with 4; move it away"):
        RowsFile(file, {"steps": 4})


def test_a_curve_tells_the_loss_at_any_step_once_ten_are_over() -> None:
    losses = [10.0] * 10 + [8.0] * 10 + [4.0] * 10 + [1.0] * 5
    means = loss_curves.curve(losses)
    assert means == [10.0, 8.0, 4.0]
    assert loss_curves.at_step(means, 9.9) is None
    assert loss_curves.at_step(means, 10) == 10.0
    assert loss_curves.at_step(means, 20) == 9.0
    assert loss_curves.at_step(means, 25) == 7.5
    assert loss_curves.at_step(means, 30) == loss_curves.last(losses[:30]) == 6.0
    assert loss_curves.at_step(means, 3000) == 6.0


def test_every_codec_is_tried_from_both_starts_and_dense_once_each() -> None:
    found = cases(["gpt"], list(STARTS), list(BOUNDARIES), [""])
    assert len(found) == len(STARTS) * (1 + (len(TRIED) - 1) * len(BOUNDARIES))
    assert [case.name for case in cases(["resnet"], [SCRATCH], [1, 3], ["none"])] == ["resnet, scratch, none"]


def test_goals_are_judged_where_both_sides_were_measured() -> None:
    best = row(f"ours: {HEADLINE.name}", 1.0, link=0.9)
    dense = row(f"ours: {DENSE.name}", 4.0)
    rows = [best, dense, row("torch, grouped", 9.0), row("ours: equal-ops, dense", 1.6, uniform=True)]
    losses = {best.name: 2.01, dense.name: 2.0, rows[-1].name: 1.9}
    judged = {goal.what: goal for goal in goals(rows, lambda each: losses.get(each.name))}
    assert {what: goal.met for what, goal in judged.items()} == {
        "torch, grouped, over ours": False,
        "our best uniform baseline over ours": True,
        "step over its slowest stage or link": True,
        "loss after 300 steps over dense": True,
        "our best uniform baseline that is within 1% of dense, over ours": True,
    }
    assert judged["step over its slowest stage or link"].value == pytest.approx(1 / 0.9)
    rows.append(replace(best, setting="fast", seconds=0.5))
    assert "over our own fast network" in " ".join(goal.what for goal in goals(rows, lambda each: None))
    assert list(goals(rows[1:4], lambda each: None)) == []


def test_rounds_are_compared_one_by_one() -> None:
    """A machine that gets slower from round to round slows both sides down."""
    ours = of_rounds([row(f"ours: {HEADLINE.name}", seconds) for seconds in (1.0, 2.0, 6.0)])
    theirs = of_rounds([row("torch, grouped", seconds) for seconds in (11.0, 22.0, 48.0)])
    assert (ours.seconds, ours.fastest, ours.slowest) == (2.0, 1.0, 6.0)
    (goal,) = (goal for goal in goals([ours, theirs], lambda each: None) if "grouped" in goal.what)
    assert goal.values == (11.0, 11.0, 8.0)
    assert goal.value == 11.0
    assert goal.met
    # Not of the same rounds: medians are compared.
    (goal,) = (goal for goal in goals([ours, replace(theirs, rounds=())], lambda each: None) if "grouped" in goal.what)
    assert goal.values == (11.0,)


def test_torch_s_ranks_stand_on_workers_of_their_setting() -> None:
    for setting in SETTINGS.values():
        for order in setting.orders.values():
            assert len(set(order)) == STAGES
            assert set(order) <= set(setting.workers)
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def test_home_devices_ask_together_for_little_more_than_a_core() -> None:
    home = SETTINGS["home-devices"].topology()
    slowdowns = [home.slowdown(name) for name in topologies.names(home)]
    assert len(slowdowns) == 6
    assert max(slowdowns) == pytest.approx(4 * min(slowdowns))
    assert sum(1 / times for times in slowdowns) < 1.5
