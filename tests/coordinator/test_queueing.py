"""Who is offered to a job that asks for a number of workers, and what becomes of those that its plan leaves out."""

from __future__ import annotations

from coordinator_cases import job_record, job_spec
from recovery_cases import Play

from coordinator.life import events as ev
from coordinator.life import queueing
from coordinator.life.jobs import Job
from fusion.messages import Device, Heartbeat


def pool(**memory: int) -> Play:
    """Idle workers, and a job that has ended."""
    play = Play("".join(memory), memory=memory)
    play.post(ev.CancelRequested(play.now, "job"))
    return play


def submitted(play: Play, number: int, workers: int) -> Job:
    job = job_record(job_spec(plan={"workers": workers}), id=f"job-{number}", number=number)
    play.post(ev.JobSubmitted(play.now, job))
    return play.lifecycle.jobs[job.id]


def reason(play: Play, job: Job) -> str:
    decided = queueing.decide([job], play.lifecycle.pool.live())
    return decided.reasons.get(job.id, "starts")


def test_the_scheduler_chooses_among_all_that_are_idle_and_the_others_are_free() -> None:
    play = pool(a=0, b=0, c=0, d=0)
    first, second = submitted(play, 1, 2), submitted(play, 2, 2)
    asked = play.asked_plan()
    assert (asked.job, asked.workers) == ("job-1", ("a", "b", "c", "d"))
    assert second.reason == "waits for 2 workers: all 4 workers are busy"
    play.answer(asked, ("a", "c"))
    assert list(first.hosts) == ["a", "c"]
    asked = play.asked_plan()
    assert (asked.job, asked.workers) == ("job-2", ("b", "d"))


def test_a_refused_job_waits_for_roomier_workers_only() -> None:
    play = pool(a=10, b=20, c=10)
    job = submitted(play, 1, 2)
    play.post(ev.PlanRefused(play.now, job.id, job.attempt, "10 B missing"))
    assert (job.state, reason(play, job)) == ("queued", "10 B missing")
    play.join("d", 10)
    assert reason(play, job) == "10 B missing"
    small = submitted(play, 2, 1)
    assert small.state == "preparing", "a job that is refused for all that the pool has holds nobody back"
    play.post(ev.CancelRequested(play.now, small.id))
    play.join("e", 15)
    assert job.state == "preparing"
    assert play.asked_plan().workers == ("a", "b", "c", "d", "e")


def test_who_has_a_higher_limit_but_takes_it_for_itself_is_not_roomier() -> None:
    play = pool(a=10, b=10, c=0)
    play.member("c").device = Device(memory_bytes=1000)
    play.say("c", Heartbeat(incarnation=play.member("c").incarnation, memory_used_bytes=990))
    play.member("c").state = "lost"
    job = submitted(play, 1, 2)
    play.post(ev.PlanRefused(play.now, job.id, job.attempt, "10 B missing"))
    play.member("c").state = "idle"
    assert reason(play, job) == "10 B missing"
    play.member("c").own_bytes = 10
    assert reason(play, job) == "starts"


def test_a_refused_job_waits_for_a_roomier_worker_that_is_busy() -> None:
    play = pool(a=10, b=10, c=30)
    other = submitted(play, 1, 1)
    play.answer(play.asked_plan(), ("c",))
    job = submitted(play, 2, 1)
    play.post(ev.PlanRefused(play.now, job.id, job.attempt, "10 B missing"))
    assert job.reason == "10 B missing"
    assert submitted(play, 3, 1).reason == "waits behind job job-2 in the queue"
    play.post(ev.CancelRequested(play.now, other.id))
    assert job.state == "preparing"
