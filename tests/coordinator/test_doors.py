"""Who is gone is found out at its door when a connection was closed or its name is wanted; who lives stays. Sans I/O."""

from __future__ import annotations

import pytest
from coordinator_cases import job_record, job_spec
from recovery_cases import Play

from coordinator.entry.entrance import NameAskedForError, NameTakenError, admit
from coordinator.life import events as ev
from coordinator.life.pool import Member
from fusion.messages import Adopt, Device, JoinRequest, Unreached


def greeted(*args: str, **options: int) -> Play:
    """A job whose workers' doors have all opened."""
    play = Play(*args, **options)  # type: ignore[arg-type]
    for member in play.lifecycle.pool.live():
        play.post(ev.WorkerGreeted(play.now, member.incarnation))
    return play


def closed(play: Play) -> None:
    play.post(ev.ConnectionClosed(play.now))


def probes(play: Play) -> list[ev.ProbeWorker]:
    found = [each for each in play.out if isinstance(each, ev.ProbeWorker)]
    play.out = [each for each in play.out if not isinstance(each, ev.ProbeWorker)]
    return found


def refused(play: Play, asked: ev.ProbeWorker) -> None:
    play.post(ev.WorkerUnreachable(play.now, asked.incarnation, asked.unless_heard_after))


# A closed connection ----------------------------------------------------------------------------------------------


def test_who_stays_silent_after_a_connection_was_closed_is_knocked_at_and_lost_by_its_own_refusal() -> None:
    play = greeted("abc")
    step = play.backed_up()
    closed(play)
    assert not probes(play)
    play.tick(1.0, silent="b")
    (asked,) = probes(play)
    assert asked.worker == "b"
    assert all(member.live for member in play.lifecycle.pool)
    refused(play, asked)
    assert play.member("b").state == "lost"
    assert {order.step for order in play.sent(Adopt).values()} == {step}


def test_the_only_host_of_a_job_is_missed_long_before_the_timeout() -> None:
    play = greeted("ab", 1, failure_timeout=60)
    play.train(1, 3)
    closed(play)
    play.tick(1.0, silent="a")
    (asked,) = probes(play)
    refused(play, asked)
    assert play.job.restarts == 1
    assert list(play.job.hosts) == ["b"]


def test_an_idle_worker_and_one_that_prepares_are_missed_too() -> None:
    play = greeted("abc", 2)
    play.post(ev.JobSubmitted(play.now, job_record(job_spec(plan={"workers": 1}), id="other", number=2)))
    assert (play.member("c").state, play.lifecycle.jobs["other"].state) == ("busy", "preparing")
    play.join("d")
    play.post(ev.WorkerGreeted(play.now, play.member("d").incarnation))
    closed(play)
    play.tick(1.0, silent="cd")
    for asked in probes(play):
        refused(play, asked)
    assert [member.name for member in play.lifecycle.pool.live()] == ["a", "b"]
    assert play.lifecycle.jobs["other"].state == "queued"


def test_silence_alone_and_a_door_that_does_not_refuse_change_nothing_before_the_timeout() -> None:
    play = greeted("abc")
    play.tick(4.0, silent="b")
    assert not probes(play)
    play.tick(0.1)
    closed(play)
    play.tick(4.5, silent="b")
    assert [asked.worker for asked in probes(play)] == ["b", "b"]
    assert play.member("b").live
    play.tick(1.0, silent="b")
    assert not play.member("b").live


def test_who_is_heard_again_is_not_knocked_at_and_not_lost_by_an_old_refusal() -> None:
    play = greeted("abc")
    closed(play)
    play.tick(1.0, silent="b")
    (asked,) = probes(play)
    play.tick(0.1)
    refused(play, asked)
    assert play.member("b").live
    play.tick(2.0)
    play.tick(4.0, silent="b")
    assert not probes(play)


def test_a_last_word_that_is_taken_in_after_the_connection_closed_settles_nothing() -> None:
    play = greeted("abc")
    closed(play)
    play.tick(0.5)
    play.tick(1.0, silent="b")
    assert [asked.worker for asked in probes(play)] == ["b"]


def test_a_door_that_never_opened_or_is_not_the_workers_own_says_nothing() -> None:
    play = Play("abc")
    play.lifecycle.relays.own_port = 9000
    play.post(ev.WorkerGreeted(play.now, play.member("a").incarnation))
    play.post(ev.WorkerGreeted(play.now, play.member("b").incarnation))
    play.say("c", Unreached(peer="b"))
    closed(play)
    play.tick(1.0, silent="abc")
    assert [asked.worker for asked in probes(play)] == ["a"]


# A name that is wanted --------------------------------------------------------------------------------------------


def claim(play: Play, name: str) -> Member:
    """Another process asks for this worker's name."""
    request = JoinRequest(
        name=name,
        protocol_version=1,
        fusion_version="",
        torch_version="",
        device=Device(),
        data_endpoint="tcp://x:2",
        public_key="k" * 40,
    )
    play.post(ev.NameClaimed(play.now, play.member(name).incarnation))
    return admit(play.lifecycle, request, play.now)


def test_the_name_of_a_live_worker_is_refused_without_a_knock() -> None:
    play = greeted("ab")
    play.tick()
    with pytest.raises(NameTakenError, match=r"heard 0.0 s ago\); choose another --name") as raised:
        claim(play, "b")
    assert not isinstance(raised.value, NameAskedForError)
    assert not probes(play)


@pytest.mark.parametrize("restarted", [False, True])
def test_the_name_of_a_dead_worker_is_free_as_soon_as_its_door_has_refused(restarted: bool) -> None:
    play = greeted("ab", failure_timeout=60)
    play.tick(1.0, silent="b")
    if restarted:
        play.restart_coordinator()
    with pytest.raises(NameAskedForError, match=r"silent; if it is gone, its name is free in \d+ s at the latest"):
        claim(play, "b")
    (asked,) = probes(play)
    refused(play, asked)
    assert play.member("b").state == "lost"
    assert claim(play, "b").name == "b"


def test_the_name_of_a_worker_whose_door_says_nothing_is_free_after_a_third_of_the_timeout() -> None:
    play = Play("ab", failure_timeout=30)
    play.tick(9.5, silent="b")
    with pytest.raises(NameAskedForError, match="free in 1 s"):
        claim(play, "b")
    assert not probes(play)
    play.tick(1.0, silent="b")
    assert claim(play, "b").name == "b"


def test_a_worker_that_is_silent_and_lives_keeps_its_name_when_it_is_heard() -> None:
    play = greeted("ab", failure_timeout=60)
    play.tick(2.0, silent="b")
    with pytest.raises(NameAskedForError):
        claim(play, "b")
    (asked,) = probes(play)
    play.tick()
    refused(play, asked)
    with pytest.raises(NameTakenError, match="choose another"):
        claim(play, "b")
    assert play.member("b").live
