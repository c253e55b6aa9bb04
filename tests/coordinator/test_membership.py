"""Who counts as lost: silence of a worker, and never the time in which the coordinator itself did not listen. Sans I/O."""

from __future__ import annotations

import asyncio

import pytest
from recovery_cases import Play

from coordinator.life import events as ev
from coordinator.life.backup_workers import choose
from coordinator.plans.candidates import candidates
from fusion.messages import Heartbeat, PeerLost, Shutdown


def ticks(play: Play, count: int, every: float) -> None:
    """The coordinator's clock ticks and nobody says anything."""
    for _ in range(count):
        play.now += every
        play.post(ev.ClockTicked(play.now))


def test_a_coordinator_that_was_not_listening_holds_it_against_nobody() -> None:
    play = Play("ab")
    play.tick()
    for seconds in (4.9, 5.1, 3600.0):
        ticks(play, 1, seconds)
        assert all(member.live for member in play.lifecycle.pool)
        play.tick()
    assert play.job.restarts == 0


@pytest.mark.parametrize("every", [0.1, 0.5, 0.8, 2.0])
def test_a_coordinator_that_is_always_late_notices_silence_all_the_same(every: float) -> None:
    play = Play("ab")
    ticks(play, int(5.0 / min(every, 0.5)) + 1, every)
    assert not any(member.live for member in play.lifecycle.pool)


def test_what_a_process_takes_at_rest_is_no_room_for_fragments() -> None:
    """`b` may use 1,000 bytes and takes 500 without a job, so about 600 with one."""
    play = Play("ab", hosts=1, memory={"b": 1000})
    play.say("b", Heartbeat(incarnation=play.member("b").incarnation, memory_used_bytes=500))
    asked = ev.MakePlan("job", 1, ("a", "b"), play.plan, {})
    assert [each.device.memory_bytes for each in asyncio.run(candidates(play.lifecycle, asked))] == [0, 400]
    play.say("b", Heartbeat(incarnation=play.member("b").incarnation, memory_used_bytes=990))
    assert play.member("b").room_bytes == 1  # Never 0, which is no limit.


def test_what_a_worker_takes_for_a_job_is_room_all_the_same() -> None:
    play = Play("abc", memory={"b": 10_000}, fragment_bytes=1000)
    assert "b" in play.run.backups.values()
    play.say("b", Heartbeat(incarnation=play.member("b").incarnation, memory_used_bytes=9_000))
    assert play.member("b").room_bytes == 10_000
    play.member("b").own_bytes = 7_000
    chosen, _ = choose(play.job, play.plan, play.lifecycle.pool.of_job("job"))
    assert "b" not in chosen.values()


def test_after_a_restart_silence_counts_from_its_end_of_grace_and_nobody_was_heard_in_the_future() -> None:
    play = Play("ab")
    play.tick()
    play.now += 100.0
    play.restart_coordinator()
    assert all(member.last_heard <= play.now for member in play.lifecycle.pool)
    play.tick(9.5, silent="ab")
    assert all(member.live for member in play.lifecycle.pool)
    play.tick(1.0, silent="ab")
    assert not any(member.live for member in play.lifecycle.pool)


def test_who_leaves_does_not_wait_for_a_time_that_a_clock_that_was_set_back_has_yet_to_reach() -> None:
    play = Play("ab", every=10)
    play.train(1, 3)
    play.run.cant_move = "nobody has room"
    play.leave("b")
    assert play.member("b").state == "draining"
    play.now -= 3600.0
    play.restart_coordinator()
    assert play.member("b").joined_at <= play.now
    play.tick(25.0)
    assert not play.member("b").live


def test_little_is_kept_of_those_that_are_gone() -> None:
    """Each process of a worker is another incarnation: a pool that lives long has known many."""
    play = Play("ab")
    for number in range(100):
        play.tick(1.0)
        stranger = f"stranger{number}"
        play.post(ev.Reported(play.now, stranger, Heartbeat(incarnation=stranger)))
        play.join("c")
        play.post(ev.Reported(play.now, play.member("a").incarnation, PeerLost(job="job", peer="b")))
        play.post(ev.Reported(play.now, play.member("c").incarnation, PeerLost(job="job", peer="a")))
    assert len([each for each in play.out if isinstance(each, ev.Send) and isinstance(each.message, Shutdown)]) == 100
    assert len(play.lifecycle._membership._evicted) <= 6
    assert len(play.lifecycle._recovery._probed) <= 1
