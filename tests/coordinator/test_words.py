"""What people are told: what workers say, once, from whom, and not without end; and what becomes of a job."""

from __future__ import annotations

import math
from pathlib import Path

from coordinator_cases import FakeWorker, Server, serving
from recovery_cases import Play

from coordinator.life import events as ev
from coordinator.life.words import BURST, MOST_LETTERS, Words
from fusion.messages import Failure, FragmentTimes, StepReport, Warned


def said(number: int, text: str = "") -> Warned:
    return Warned(message=text or f"message {number}")


def test_the_same_is_kept_once_and_of_one_worker_only_so_much() -> None:
    words = Words()
    assert words.take(0.0, "a", said(0)) == "message 0"
    assert words.take(0.0, "a", said(0)) is None
    kept = [words.take(0.0, "a", said(number)) for number in range(1, 10 * BURST)]
    assert [text for text in kept if text is not None] == kept[: BURST - 1]
    assert (kept[BURST - 2] or "").endswith("(it says too much: what follows is dropped for a while)")
    assert words.dropped == 9 * BURST
    assert words.take(0.0, "b", said(1)) == "message 1"
    # Later it may say something again.
    assert words.take(20.0, "a", said(-1)) == "message -1"
    assert len(words.take(20.0, "b", said(0, "x" * 10 * MOST_LETTERS)) or "") == MOST_LETTERS
    assert max(len(warned.message) for _, warned in words._said) == MOST_LETTERS, "no more of it is kept"
    words.forget(frozenset({"b"}))
    assert set(words._allowed) == {"b"}


async def test_a_flood_of_one_worker_is_counted_and_others_are_heard(tmp_path: Path) -> None:
    async with serving(tmp_path / "state") as server, FakeWorker(server, "a") as good, FakeWorker(server, "b") as bad:
        job = await server.submit(plan={"workers": 1})
        for number in range(3000):
            await bad.say(said(number))
        await server.until_state(job["id"], "done")
        assert not good.evicted.is_set()
        page = await counted(server, "fusion_coordinator_warnings_dropped_total")
        assert 3000 - 3 * BURST <= page <= 3000 - BURST
        _, told = await server.call("GET", "/api/v1/events")
        assert sum(event["event"] == "warning" for event in told["events"]) == 3000 - page


async def counted(server: Server, name: str) -> float:
    """Once all of the flood has been taken in."""
    while server.engine.control.received.get("warned", 0) < 3000:
        await server.call("GET", "/healthz")
    _, page = await server.call("GET", "/metrics")
    return next(float(line.split()[1]) for line in page.decode().splitlines() if line.startswith(f"{name} "))


def test_the_story_of_a_plan_counts_in_words() -> None:
    assert any(": 1 fragment on 1 worker (a)" in story for story in Play("a").stories())
    assert any(": 3 fragments on 2 workers (a, b)" in story for story in Play("ab", fragments=3).stories())


def test_why_a_job_fails_is_kept_as_far_as_anybody_reads_it() -> None:
    """It goes into the job's record, and over every stream that shows the job."""
    play = Play("a")
    told = Failure(job="job", epoch=0, message="m" * 10**6, detail="a" * 10**7 + "the error itself")
    play.say("a", told)
    assert play.job.state == "failed"
    assert len(play.job.reason) < 2100
    (log,) = [each for each in play.out if isinstance(each, ev.RecordLog)]
    assert len(log.message) <= 2**16
    assert log.message.endswith("the error itself")
    assert all(len(story) < 2200 for story in play.stories())


def test_a_loss_that_is_no_number_is_told_once_and_when_it_is_one_again() -> None:
    play = Play("a")
    for step, loss in enumerate((1.0, math.nan, math.inf, math.nan, 0.5, math.nan), 1):
        times = [FragmentTimes(fragment=0, forward=0, backward=0, update=0)]
        play.say("a", StepReport(job="job", epoch=0, step=step, fragments=times, loss=loss, sent_bytes=0))
    told = [each.message for each in play.out if isinstance(each, ev.RecordEvent) and "loss" in each.event]
    assert "a smaller train.optimizer.lr" in told[0]
    stories = [message.split(";")[0] for message in told]
    assert stories == ["loss is nan from step 2 on", "loss is 0.5 again at step 5", "loss is nan from step 6 on"]


def test_a_first_loss_that_is_no_number_is_no_matter_of_the_rate() -> None:
    play = Play("a")
    times = [FragmentTimes(fragment=0, forward=0, backward=0, update=0)]
    play.say("a", StepReport(job="job", epoch=0, step=1, fragments=times, loss=math.nan, sent_bytes=0))
    (told,) = [each.message for each in play.out if isinstance(each, ev.RecordEvent) and "loss" in each.event]
    assert told == "loss is nan from step 1 on; look at the data, the model's first weights and the loss"


async def test_every_refusal_of_a_request_is_counted_by_its_status(server: Server) -> None:
    await server.call("GET", "/nowhere")
    await server.call("GET", "/api/v1/jobs/nope")
    await server.call("POST", "/api/v1/jobs", json={})
    await server.call("POST", "/api/v1/jobs", "join", json={})
    _, page = await server.call("GET", "/metrics")
    lines = [line for line in page.decode().splitlines() if line.startswith("fusion_coordinator_http_refused_total{")]
    assert lines == [
        'fusion_coordinator_http_refused_total{status="400"} 1.0',
        'fusion_coordinator_http_refused_total{status="403"} 1.0',
        'fusion_coordinator_http_refused_total{status="404"} 2.0',
    ]


async def test_what_a_worker_has_refused_is_shown(server: Server) -> None:
    worker = FakeWorker(server, "a")
    worker.refused = 7
    async with worker:
        while True:
            _, listed = await server.call("GET", "/api/v1/workers")
            if listed["workers"][0]["refused"] == 7:
                break
        _, page = await server.call("GET", "/metrics")
    assert 'fusion_worker_messages_refused_total{worker="a"} 7.0' in page.decode()
