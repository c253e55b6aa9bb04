"""What a person sees of a run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fusion.client import StreamItem
from fusion.run_view import History, RunView, sparkline


def metric(step: int, **more) -> StreamItem:
    data = {"step": step, "loss": 4.0 / step, "step_seconds": 0.5, "sent_bytes": 1024, "tokens": 100, "epoch": 0}
    return StreamItem("metrics", {**data, **more})


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([], ""), ([1.0], ""), ([0.0, 7.0], "▁█"), ([3.0, 3.0], "▁▁"), ([1.0, float("nan"), 2.0, float("inf")], "▁█")],
)
def test_sparkline(values, drawn):
    assert sparkline(values) == drawn


def test_sparkline_is_never_wider_than_asked():
    assert len(sparkline([float(i) for i in range(1000)], width=10)) == 10


def test_history():
    history = History()
    for step in range(1, 5):
        history.add(metric(step, eval_loss=2.5 if step == 4 else None).data)
    assert history.losses == [4.0, 2.0, 4 / 3, 1.0]
    assert history.evaluations == [(4, 2.5)]
    assert history.remaining(10) == 3.0
    assert history.rate == "200 tokens/s"
    assert History().rate == "-"


def test_plain_lines():
    out = io.StringIO()
    with RunView("job", 200, Console(file=out, width=200)) as view:
        view.status("capturing")
        view.show(StreamItem("job", {"state": "queued", "reason": "waits for 2 [more] workers"}))
        for step in range(1, 201):
            view.show(metric(step, eval_loss=1.5 if step == 199 else None))
        view.show(StreamItem("event", {"event": "worker-lost", "message": "worker b is lost"}))
        view.show(StreamItem("job", {"state": "done", "reason": ""}))
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["capturing", "queued: waits for 2 [more] workers"]
    assert lines[2].startswith("step 1/200  loss 4.0000  500 ms/step  1.0 KiB sent  ETA 1m40s")
    assert any("held-out loss 1.5000" in line for line in lines)
    assert lines[-1] == "worker-lost: worker b is lost"
    assert len(lines) < 40


def test_a_loss_that_is_not_a_number_is_shown():
    out = io.StringIO()
    with RunView("job", 1, Console(file=out, width=200)) as view:
        view.show(metric(1, loss=None))
    assert "loss -" in out.getvalue()


@pytest.mark.parametrize("live", [False, True])
def test_the_last_loss_does_not_stand_for_later_ones_that_are_no_numbers(live):
    out = io.StringIO()
    with RunView("job", 3, Console(file=out, width=200, force_terminal=live)) as view:
        view.show(metric(1, loss=2.5))
        view.show(metric(2, loss=1.5e37))
        assert not live or "loss [bold]1.5000e+37[/bold]" in view.facts()
        view.show(metric(3, loss=None))
        assert not live or "loss [bold]-[/bold]" in view.facts()
    if not live:
        assert [line.split("  ")[1] for line in out.getvalue().splitlines()] == [
            "loss 2.5000",
            "loss 1.5000e+37",
            "loss -",
        ]


def test_the_live_line():
    out = io.StringIO()
    console = Console(file=out, width=140, force_terminal=True)
    with RunView("job", 10, console) as view:
        view.show(StreamItem("job", {"state": "preparing", "reason": "planning [x]"}))
        assert "preparing: planning (x]" in view.facts()
        for step in range(1, 10):
            view.show(metric(step))
        facts = view.facts()
    assert "loss [bold]0.4444[/bold]" in facts
    assert "ETA 500 ms" in facts
    assert "9.0 KiB sent" in facts


@pytest.mark.parametrize(
    ("width", "kept", "left_out"),
    [
        (140, ["held out 1.5000", "500 ms/step", "KiB sent", "ETA", "▁"], []),
        (100, ["held out 1.5000", "500 ms/step", "ETA", "▁"], ["sent"]),
        (80, ["held out 1.5000", "ETA"], ["sent", "/step"]),
        (60, ["loss [bold]0.0267[/bold]"], ["held out", "sent", "ETA"]),
    ],
)
def test_the_live_line_has_the_held_out_loss_and_stays_one_line(width, kept, left_out):
    out, drawn = io.StringIO(), io.StringIO()
    with RunView("gpt-small", 200, Console(file=out, width=width, force_terminal=True)) as view:
        for step in range(1, 151):
            view.show(metric(step, eval_loss=1.5 if step == 100 else None))
        facts = view.facts()
    assert all(part in facts for part in kept)
    assert not any(part in facts for part in left_out)
    Console(file=drawn, width=width).print(view._progress.get_renderable())
    assert len(drawn.getvalue().splitlines()) == 1


def test_quiet(capsys):
    with RunView("job", 2, quiet=True) as view:
        view.status("capturing")
        view.show(metric(1))
    assert capsys.readouterr() == ("", "")
    assert view.history.losses == [4.0]
