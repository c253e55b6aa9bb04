"""`fusion top`: what it shows is what the stream says, also after a break, and nothing in a name becomes markup."""

from __future__ import annotations

import pytest
from loopback_server import as_json, serving
from rich.console import Console
from test_cli import JOB, WORKER, run

from fusion.client import StreamItem
from fusion.pool_view import PoolView

DEVICE = {**WORKER["device"], "flops_per_second": 2.5e9}
FULL_WORKER = {**WORKER, "device": DEVICE, "joined_at": 100.0}


def drawn(view: PoolView, now: float = 160.0) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view.draw(now))
    return console.export_text()


def metric(step: int, loss: float | None = 1.0) -> StreamItem:
    data = {"job": "small-1", "step": step, "loss": loss, "step_seconds": 0.5, "sent_bytes": 1024, "tokens": 100}
    return StreamItem("metrics", data)


def test_rates_are_of_the_latest_steps_and_repeats_do_not_count_twice():
    view = PoolView("http://x:1")
    view.take(StreamItem("worker", dict(FULL_WORKER)))
    view.take(StreamItem("job", dict(JOB)))
    for step in (4, 5, 5, 4, 6):
        view.take(metric(step))
    text = drawn(view)
    assert "1 worker, 1 busy  1 running  sent 2.0 KiB/s" in text
    for word in ("small-1", "6/10", "500 ms", "200 tokens/s", "2.0 s", "1.0 MiB / 1.0 GiB", "2 GFLOP/s", "1m00s"):
        assert word in text, word


def test_the_speed_of_data_that_is_no_text_is_in_samples():
    view = PoolView("http://x:1")
    view.take(StreamItem("job", dict(JOB)))
    data = {"job": "small-1", "step": 4, "loss": 1.0, "step_seconds": 0.5, "sent_bytes": 0, "samples": 32}
    view.take(StreamItem("metrics", data))
    assert "64.0 samples/s" in drawn(view)


def test_who_left_is_gone_and_a_new_stream_forgets_who_left_meanwhile():
    view = PoolView("http://x:1")
    view.take(StreamItem("worker", dict(FULL_WORKER)))
    view.take(StreamItem("worker", {**FULL_WORKER, "state": "left"}))
    assert view.workers == {}
    view.take(StreamItem("worker", dict(FULL_WORKER)))
    view.problem = "can't reach the coordinator; trying again"
    assert view.problem in drawn(view)
    view.start_anew()
    assert (view.workers, view.problem) == ({}, "")


def test_a_story_is_told_once_and_names_are_no_markup():
    view = PoolView("http://x:1")
    for seq in (1, 2, 2, 1):
        view.take(StreamItem("event", {"seq": seq, "time": 1.0, "message": f"[bold]event {seq}[/bold]"}))
    view.take(StreamItem("job", {**JOB, "id": "[red]x[/red]", "state": "queued", "reason": "[blink]no workers"}))
    text = drawn(view)
    assert text.count("[bold]event 2[/bold]") == 1
    assert "[red]x[/red]" in text
    assert "[blink]no workers" in text


@pytest.mark.parametrize("arguments", [("top", "--once"), ("top",)])
def test_without_a_terminal_it_prints_once(capsys, monkeypatch, arguments):
    answers = {
        "/api/v1/workers": {"workers": [FULL_WORKER]},
        "/api/v1/jobs": {"jobs": [JOB]},
        "/api/v1/jobs/small-1/metrics": {"metrics": [metric(3).data]},
    }
    with serving(lambda method, path, body, headers: as_json(answers[path.partition("?")[0]])) as url:
        monkeypatch.setenv("FUSION_COORDINATOR", url)
        code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    assert "small-1" in out
    assert "2.0 KiB/s" in out
