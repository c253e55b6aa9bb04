"""Single faults at chosen moments, and proof that the schedules would find what they look for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
from protocol_values import CASES, Value
from protocol_world import COORDINATOR, World
from pydantic import BaseModel
from test_schedules import Schedule

from coordinator.life.backups import Backups
from executor.ordering import Task, TaskKind
from fusion.messages import Backup
from fusion.plan import Plan
from fusion.wire import FrameKind
from worker.protocol.dispatch import Dispatch
from worker.protocol.instructions import LendParameters
from worker.protocol.session import Session

cases = pytest.mark.parametrize("case", sorted(CASES))


def reach(world: World, step: int) -> None:
    """Let the job come to a step."""
    world.play_until(lambda: world.job.step >= step)


def disturbed(world: World, step: int, worker: int = 1) -> World:
    """Kill a worker after a step."""
    reach(world, step)
    world.live()[worker].die()
    return world


@cases
def test_in_good_weather_an_adoption_needs_no_message_twice(case: str) -> None:
    for seed in range(3):
        world = World(case, seed, workers=3)
        disturbed(world, 4)
        world.finish()
        assert world.job.recoveries + world.job.restarts > 0
        if world.job.recoveries:
            assert not world.sent[FrameKind.RESEND]


@cases
def test_a_lost_word_that_somebody_follows_the_plan_is_asked_for_once(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for it holds back all that the other needs, and would be asked for each message by itself."""
    say, lost = Session._say_switched, list[str]()

    def said(session: Session[Any], floor: int, peers: Sequence[str], *, ask: bool = False) -> None:
        if peers and not lost:
            lost.append(peers[0])
            peers = peers[1:]
        say(session, floor, peers, ask=ask)

    monkeypatch.setattr(Session, "_say_switched", said)
    world = World(case, seed=1, workers=3)
    disturbed(world, 4)
    world.finish()
    assert lost
    assert (bool(world.job.recoveries), world.job.restarts) == (True, 0)
    assert world.sent[FrameKind.RESEND] <= 4


@cases
def test_what_is_late_is_not_sent_twice(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(seconds: float) -> Counter[FrameKind]:
        world = World(case, seed=2, workers=3)
        carry = world.network.data

        def late(source: str, target: str, deliver: Callable[[], None]) -> None:
            world.clock.at(seconds, lambda: carry(source, target, deliver))

        monkeypatch.setattr(world.network, "data", late)
        world.finish()
        assert not world.job.recoveries + world.job.restarts
        return world.sent

    near, far = sent(0.0), sent(4.0)
    assert far[FrameKind.UNDER_WAY]
    assert not far[FrameKind.MISSED]
    for kind in (FrameKind.ACTIVATION, FrameKind.GRADIENT, FrameKind.NORMS):
        assert far[kind] == near[kind]


@cases
def test_fragments_that_move_in_good_order_replay_nothing(case: str) -> None:
    moves = 0
    for seed in range(4):
        world = World(case, seed, workers=3)
        reach(world, 2)
        world.start_worker("d")
        world.live()[seed % 2].leave()
        world.finish()
        if not world.job.restarts:
            moves += any(" -> " in line for line in world.story)
            assert set(world.executed.values()) == {1}
    assert moves


@cases
def test_a_worker_that_dies_as_soon_as_it_has_got_fragments_sends_nobody_back(case: str) -> None:
    """Their former host still has the snapshots with which they moved."""
    moves = 0
    for seed in range(6):
        world = World(case, seed, workers=3)
        reach(world, 2)
        world.start_worker("d")
        world.live()[0].leave()
        world.play_until(lambda world=world: " -> " in world.story[-1] or world.job.state == "done")
        if " -> " in world.story[-1]:
            moves += 1
            host = world.process(world.story[-1].split(" -> ")[1].split()[0])
            assert host is not None
            host.die()
            world.finish()
            assert not any(f"because worker {host.name} was lost" in line for line in world.story), "\n".join(
                world.story
            )
    assert moves


@cases
@pytest.mark.parametrize("step", [0, 3, 9])
def test_every_worker_gone_and_back(case: str, step: int) -> None:
    world = World(case, seed=step, workers=3)
    reach(world, step)
    for process in world.live():
        process.die()
    world.play(30)
    world.start_worker("e")
    world.finish()
    assert world.job.restarts or step == 0


@pytest.mark.parametrize("after", range(0, 30, 3))
def test_the_coordinator_dies_while_it_has_a_loss_to_tell(after: int) -> None:
    world = disturbed(World("tied", seed=after, workers=4), 3)
    assert world.coordinator is not None
    world.coordinator.fuse = after
    world.play(60)
    world.finish()


@pytest.mark.parametrize("after", range(1, 8))
def test_the_coordinator_dies_while_it_starts_a_job(after: int) -> None:
    world = World("chain", seed=after, workers=3)
    world.play_until(lambda: world.job.state == "preparing" and bool(world.job.ready))
    assert world.coordinator is not None
    world.coordinator.fuse = after
    world.play(60)
    world.finish()


@pytest.mark.parametrize("share", [1, 2])
def test_an_order_for_snapshots_that_got_lost_is_given_again(monkeypatch: pytest.MonkeyPatch, share: int) -> None:
    """With full logs nobody goes on to the step of the snapshots without it."""
    tell, lost = World.tell, list[int]()

    def tell_or_lose(self: World, incarnation: str, message: BaseModel) -> None:
        if isinstance(message, Backup) and not message.again:
            lost.append(message.step)
            if len(lost) % share == 0:
                return
        tell(self, incarnation, message)

    monkeypatch.setattr(World, "tell", tell_or_lose)
    world = World("tied", workers=4, log_memory=150)
    world.finish()
    assert lost
    assert not world.job.restarts


@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_sent_to_a_worker_while_its_connection_was_broken_is_sent_again(workers: int) -> None:
    """Broken for long enough to lose the order to build its fragments, not for so long that the worker counts as lost."""
    world = World("chain", workers=workers)
    world.play_until(lambda: world.job.state == "preparing")
    world.cut(world.live()[0].name, COORDINATOR)
    since = world.clock.now
    world.play_until(lambda: world.clock.now >= since + 4.0)
    assert world.job.state == "preparing"
    world.finish()
    assert not world.job.restarts
    assert not any("lost" in line for line in world.story), "\n".join(world.story)


def test_a_worker_leaves_although_the_coordinator_died_before_it_could_say_so() -> None:
    world = World("chain", workers=3)
    reach(world, 4)  # Too late for fragments to move to a newcomer.
    world.start_worker("d")
    coordinator, leaver = world.coordinator, world.process("d")
    assert coordinator is not None
    assert leaver is not None
    world.play_until(lambda: any(member.name == "d" for member in coordinator.lifecycle.pool.idle()))
    coordinator.fuse = 1
    world.drain("d")
    assert world.coordinator is None
    world.finish()
    world.play_until(lambda: not leaver.alive)


def test_a_full_log_does_not_stop_a_job_that_loses_a_worker_or_comes_to_its_end() -> None:
    for seed in range(12):
        disturbed(World("skips", seed, workers=3, log_memory=100), 1 + seed % 8).finish()


# Mistakes that must be found ---------------------------------------------------------------------------------------


def found(play: Callable[[int], World], schedules: Iterable[int] = range(30)) -> bool:
    """Whether one of these schedules shows that something is wrong."""
    for seed in schedules:
        try:
            play(seed).finish()
        except (AssertionError, ValueError, KeyError):
            return True
    return False


class Forgetful(Session[Value]):
    """Prunes its log after each step, whoever may still need it."""

    def completed(self, task: Task) -> None:
        super().completed(task)
        if task.kind is TaskKind.UPDATE:
            self.log.forget(task.step - 1)


class Hasty(Session[Value]):
    """Goes on one step after the snapshot that it adopted, not after the next."""

    def switch(self, plan: Plan, step: int) -> tuple[int, ...]:
        added = super().switch(plan, step)
        for fragment in added:
            if step + 2 <= self._train.steps:
                self.board.add(fragment, step + 2)
        return added


class Miserly(Session[Value]):
    """Does not lend its parameters again after a move."""

    def switch(self, plan: Plan, step: int) -> tuple[int, ...]:
        added = super().switch(plan, step)
        self._out = [each for each in self._out if not isinstance(each, LendParameters) or each.fragment in added]
        return added


def test_right_schedules_find_nothing() -> None:
    assert not found(lambda seed: disturbed(World("tied", seed), 5), range(10))


@pytest.mark.parametrize("session", [Forgetful, Hasty])
def test_a_wrong_session_is_found(session: type[Session[Value]]) -> None:
    assert found(lambda seed: disturbed(World("tied", seed, session=session), 5))


def test_a_parameter_that_is_not_lent_to_a_fragment_that_moved_is_found() -> None:
    def play(seed: int) -> World:
        world = World("tied", seed, workers=3, session=Miserly)
        reach(world, 2)
        world.live()[0].leave()
        world.finish()
        # The leaver is let go in the end, and the job goes back for it: that hides what is missing.
        assert not world.job.restarts or any("can't move" in line for line in world.story)
        return world

    assert found(play)


def test_a_snapshot_that_counts_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def complete(self: Backups, job: Any, now: float) -> bool:
        return bool(job.run.round.held)

    monkeypatch.setattr(Backups, "complete", complete)
    assert found(lambda seed: disturbed(World("tied", seed), 5))


@cases
def test_where_snapshots_take_long_nobody_stops_for_a_move(case: str) -> None:
    holds: set[bool] = set()

    class Noted(Session[Value]):
        def backup(self, step: int, backups: Mapping[int, str], hold: bool, **options: Any) -> None:
            holds.add(hold)
            super().backup(step, backups, hold, **options)

    replays = 0
    for seed in range(8):
        world = World(case, seed, workers=3, stopping=False, session=Noted)
        reach(world, 2)
        world.start_worker("d")
        world.finish()
        assert not world.job.restarts + world.job.recoveries
        replays += any(" -> " in line for line in world.story) and any(" replayed " in line for line in world.story)
    assert holds == {False}
    assert replays


def test_what_a_mover_got_from_a_fragment_beside_it_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Session[Value]):
        def backup(self, *arguments: Any, log_own: bool = False, **options: Any) -> None:
            super().backup(*arguments, **options)

    def play(seed: int) -> World:
        world = World("skips", seed, workers=3, stopping=False, session=Forgetful)
        reach(world, 2)
        world.start_worker("d")
        return world

    assert found(play)


def test_a_worker_whose_fragments_can_not_move_in_time_leaves_them_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backups, "seconds", lambda *_: 100.0)
    world = World("tied", seed=3, workers=3)
    reach(world, 4)
    leaving = world.live()[1]
    leaving.leave()
    world.finish()
    assert not leaving.alive
    assert not world.job.restarts
    assert any("would take 1m40s to move, so others adopt them" in line for line in world.story), world.story
    assert any(" adopts " in line for line in world.story)


def test_a_gradient_without_its_places_for_an_adopter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the places of what the lost worker sent: those of the adopter, on another processor, may be others.

    It is made after the adoption where the middle of a chain waits for gradients itself meanwhile: both ends are lost.
    """

    def play(seed: int) -> World:
        world = World("tied", seed, workers=4)
        reach(world, 4)
        assert world.job.plan is not None
        for fragment in (0, 3):
            process = world.process(world.job.plan.placement[fragment])
            if process is not None:
                process.die()
        return world

    assert not found(play, range(3))
    monkeypatch.setattr(Dispatch, "stayed", lambda *_: True)
    assert found(play)


def test_what_is_not_pushed_to_an_adopter_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dispatch, "held_back", lambda *_: [])
    world = disturbed(World("tied", seed=1), 5)
    world.finish()  # Asking again mends it, later.
    assert world.sent[FrameKind.RESEND]
    assert world.sent[FrameKind.MISSED]


def test_what_was_said_before_a_long_stop_is_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last reports were lost, and while nobody noticed the worker was stopped for longer than it keeps reports."""
    monkeypatch.setattr("test_schedules.note", lambda _: None)
    state = Schedule()
    state.begin(case="skips", seed=52, workers=2, backup_every=2, log_memory=2**20, keep=3, stopping=False, events=30)
    state.part_from_coordinator(index=1)
    state.stall(index=1)
    state.kill_coordinator()
    for _ in range(3):
        state.heal()
    state.teardown()
