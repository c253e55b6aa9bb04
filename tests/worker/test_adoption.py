"""Real workers adopt fragments of one that is gone, and replay; a scripted coordinator says when. The bits stay."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import pytest
import safetensors.torch
import torch
from fake_coordinator import FakeCoordinator
from pool_cases import Running, addresses, end, launch, pool, ready_job, start_job
from torch import Tensor
from worker_cases import Case, Stack, make_case

from executor.lanes import Lanes
from executor.program import FragmentProgram
from fusion.errors import PlanError, UnreachableError
from fusion.messages import (
    Adopt,
    Adopted,
    Backup,
    BackupFailed,
    CantAdopt,
    CaughtUp,
    CheckpointPart,
    Commit,
    Connect,
    Connected,
    EvaluationReport,
    Failure,
    Finished,
    Holding,
    Paused,
    PeerAddress,
    PeerLost,
    Prepare,
    Ready,
    StepReport,
)
from fusion.plan import CodecChoice
from worker.jobs.assembly import Piece
from worker.jobs.side_by_side import SideBySide
from worker.jobs.standby import Standby
from worker.machine import cores
from worker.transport.mover import Mover
from worker.transport.route import Route

LOG = 2**28
Outcome = tuple[dict[int, float], dict[int, float], dict[str, Tensor]]
_UNDISTURBED: dict[tuple[int, int], Outcome] = {}
STEPS = 60


@pytest.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    made = FakeCoordinator()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture(scope="module")
def case() -> Case:
    """Tied weights that cross fragments, clipping, evaluation."""
    return make_case(Stack(tied=True, dropout=0.0), clip=0.05, eval_every=2, steps=STEPS)


def losses(coordinator: FakeCoordinator) -> dict[int, float]:
    found: dict[int, float] = {}
    for _, message in coordinator.messages:
        if isinstance(message, StepReport) and message.loss is not None:
            assert found.setdefault(message.step, message.loss) == message.loss
    return found


def evaluations(coordinator: FakeCoordinator) -> dict[int, float]:
    found: dict[int, float] = {}
    for _, message in coordinator.messages:
        if isinstance(message, EvaluationReport):
            assert found.setdefault(message.step, message.loss) == message.loss
    return found


def final(coordinator: FakeCoordinator) -> dict[str, Tensor]:
    """The last state, of whoever uploaded it."""
    found: dict[str, Tensor] = {}
    for _, message in coordinator.messages:
        if isinstance(message, CheckpointPart) and message.step == STEPS:
            part = safetensors.torch.load(coordinator.blobs[message.blob.digest])
            for key, value in part.items():
                assert torch.equal(found.setdefault(key, value), value)
    return found


def reported(coordinator: FakeCoordinator) -> dict[int, set[int]]:
    """Step -> fragments whose updates were reported for it."""
    found: dict[int, set[int]] = {}
    for _, message in coordinator.messages:
        if isinstance(message, StepReport):
            found.setdefault(message.step, set()).update(times.fragment for times in message.fragments)
    return found


def assert_same(
    coordinator: FakeCoordinator, expected: tuple[dict[int, float], dict[int, float], dict[str, Tensor]]
) -> None:
    assert losses(coordinator) == expected[0]
    assert evaluations(coordinator) == expected[1]
    state = final(coordinator)
    assert state.keys() == expected[2].keys()
    assert all(torch.equal(state[key], value) for key, value in expected[2].items())


async def finish(coordinator: FakeCoordinator, epoch: int, *names: str) -> None:
    for name in names:
        await coordinator.until(
            lambda name=name: (
                [m for m in coordinator.of(name, Finished) if m.epoch == epoch] or coordinator.of(name, Failure)
            )
        )
        assert not coordinator.of(name, Failure), coordinator.of(name, Failure)
    fragments = set().union(*reported(coordinator).values())
    assert all(reported(coordinator)[step] == fragments for step in range(1, STEPS + 1))


async def undisturbed(
    coordinator: FakeCoordinator, case: Case, fragments: int = 3, codecs: Mapping[int, CodecChoice] | None = None
) -> Outcome:
    """All fragments on one worker that nothing happens to."""
    if (fragments, id(case)) not in _UNDISTURBED:
        async with pool(coordinator, "a"):
            await start_job(coordinator, case, ("a",) * fragments, codecs=codecs)
            await finish(coordinator, 0, "a")
            _UNDISTURBED[fragments, id(case)] = losses(coordinator), evaluations(coordinator), final(coordinator)
        coordinator.messages.clear()
        coordinator.joined.clear()
    return _UNDISTURBED[fragments, id(case)]


async def snapshot(
    coordinator: FakeCoordinator, prepare: Prepare, backups: dict[int, str], step: int, hold: bool = False
) -> None:
    """The job starts with the order of a round; return when everything is held and everybody through."""
    workers = prepare.plan.workers
    for name in {*workers, *backups.values()}:
        coordinator.send(name, Backup(job=prepare.job, epoch=prepare.plan.epoch, step=step, backups=backups, hold=hold))
    launch(coordinator, prepare)
    for fragment, name in backups.items():
        await coordinator.until(
            lambda name=name, fragment=fragment: [
                held for held in coordinator.of(name, Holding) if (held.fragment, held.step) == (fragment, step)
            ]
        )
    for name in workers:
        kind = Paused if hold else StepReport
        await coordinator.until(
            lambda name=name, kind=kind: [m for m in coordinator.of(name, kind) if m.step >= step + (not hold)]
        )


def adopt(prepare: Prepare, coordinator: FakeCoordinator, epoch: int, placement: tuple[str, ...], step: int) -> Adopt:
    plan = prepare.plan.model_copy(update={"epoch": epoch, "placement": placement})
    return Adopt(job=prepare.job, plan=plan, step=step, peers=addresses(coordinator, *placement))


BACKUPS = {0: "b", 1: "c", 2: "a"}


@pytest.mark.parametrize("lost", ["a", "b", "c"])
async def test_the_backup_worker_goes_on_where_the_lost_one_was(
    coordinator: FakeCoordinator, case: Case, lost: str
) -> None:
    expected = await undisturbed(coordinator, case)
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await ready_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG, backups=BACKUPS)
        await snapshot(coordinator, prepare, BACKUPS, 12)
        for name in ("a", "b", "c"):
            coordinator.send(name, Commit(job=prepare.job, epoch=0, step=12))
        await coordinator.until(lambda: [m for m in coordinator.of("b", StepReport) if m.step >= 15])
        await end(workers["abc".index(lost)])
        rest = [name for name in "abc" if name != lost]
        for name in rest:
            assert (await coordinator.message(name, PeerLost)).peer == lost
        heir = BACKUPS["abc".index(lost)]
        placement = tuple(heir if name == lost else name for name in ("a", "b", "c"))
        for name in rest:
            coordinator.send(name, adopt(prepare, coordinator, 1, placement, 12))
        assert (await coordinator.message(heir, Adopted)).fragments == ["abc".index(lost)]
        caught = await coordinator.message(heir, CaughtUp)
        assert caught.fragments == ["abc".index(lost)]
        assert caught.steps >= 3
        await finish(coordinator, 1, *rest)
        assert_same(coordinator, expected)


async def test_who_has_no_room_for_what_it_is_to_take_over_says_so(
    coordinator: FakeCoordinator, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def build(_: Standby, fragment: int) -> Piece:
        raise PlanError(f"fragment {fragment} is too large")

    monkeypatch.setattr(Standby, "build", build)
    async with pool(coordinator, "a", "b", "c"):
        await start_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG, backups=BACKUPS)
        for fragment, name in BACKUPS.items():
            failed = await coordinator.message(name, BackupFailed)
            assert (failed.fragment, failed.cause) == (fragment, "memory")
            assert failed.message == f"fragment {fragment} is too large"


async def test_what_could_not_be_built_ahead_for_another_reason_is_built_when_it_is_needed(
    coordinator: FakeCoordinator, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await undisturbed(coordinator, case)
    ahead: set[int] = set()
    build_now = Standby.build

    async def build(standby: Standby, fragment: int) -> Piece:
        if fragment not in ahead:
            ahead.add(fragment)
            raise UnreachableError("the coordinator is away for a moment")
        return await build_now(standby, fragment)

    monkeypatch.setattr(Standby, "build", build)
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await ready_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG, backups=BACKUPS)
        await snapshot(coordinator, prepare, BACKUPS, 12)
        assert ahead == {0, 1, 2}
        await end(workers[1])
        for name in "ac":
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", "c", "c"), 12))
        await finish(coordinator, 1, "a", "c")
        assert_same(coordinator, expected)
    assert not any(coordinator.of(name, BackupFailed) for name in "abc")


@pytest.mark.parametrize(("count", "room", "widest"), [(2, None, 3), (2, 0, 0), (1, None, 0)])
async def test_micro_batches_are_replayed_side_by_side_where_there_are_cores_and_memory(
    coordinator: FakeCoordinator,
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    room: int | None,
    widest: int,
) -> None:
    """Only what is replayed; each task's time is that on its thread."""
    expected = await undisturbed(coordinator, case)
    together: list[int] = []

    def run(lanes: Lanes, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        together.append(len(calls))
        return run_all(lanes, calls)

    run_all = Lanes.run
    monkeypatch.setattr(Lanes, "run", run)
    monkeypatch.setattr(cores, "count", lambda: count)
    if room is not None:
        monkeypatch.setattr(SideBySide, "_room", lambda self, fragment: room)
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await ready_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG, backups=BACKUPS)
        await snapshot(coordinator, prepare, BACKUPS, 12)
        await coordinator.until(lambda: [m for m in coordinator.of("b", StepReport) if m.step >= 15])
        await end(workers[1])
        assert not together
        for name in "ac":
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", "c", "c"), 12))
        await finish(coordinator, 1, "a", "c")
        assert_same(coordinator, expected)
    assert max(together, default=0) == widest
    replayed = [times for m in coordinator.of("c", StepReport) if m.step == 13 for times in m.fragments]
    assert all(times.forward > 0 and times.backward > 0 for times in replayed)


async def test_checkpoint_parts_of_replayed_steps_are_uploaded_after_the_replay(coordinator: FakeCoordinator) -> None:
    """Everybody waits for the replay, nobody for them. None is lost."""
    case = make_case(Stack(dropout=0.0), steps=STEPS, checkpoint_every=14)
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await ready_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG, backups=BACKUPS)
        await snapshot(coordinator, prepare, BACKUPS, 12)
        await coordinator.until(lambda: [m for m in coordinator.of("b", StepReport) if m.step >= 18])
        await end(workers[1])
        for name in "ac":
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", "c", "c"), 12))
        await finish(coordinator, 1, "a", "c")
    told = coordinator.of("c", CheckpointPart, CaughtUp)
    parts = {m.step: at for at, m in enumerate(told) if isinstance(m, CheckpointPart) and m.fragment == 1}
    caught = next(at for at, m in enumerate(told) if isinstance(m, CaughtUp))
    assert list(parts) == [14, 28, 42, 56, STEPS]
    assert caught < parts[14]


async def test_what_a_new_backup_worker_stands_by_with_is_built_after_the_commit(
    coordinator: FakeCoordinator, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when it is named, as that is while somebody replays."""
    built: list[tuple[str, int]] = []

    async def build(self: Standby, fragment: int) -> Piece:
        built.append((self._assembly.worker, fragment))
        return await build_one(self, fragment)

    build_one = Standby.build
    monkeypatch.setattr(Standby, "build", build)
    async with pool(coordinator, "a", "b"):
        prepare = await ready_job(coordinator, case, ("a", "a", "b"), log_bytes=LOG, backups={0: "b"})
        launch(coordinator, prepare)
        await snapshot(coordinator, prepare, {0: "b", 2: "a"}, 12)
        assert built == [("b", 0)]
        for name in "ab":
            coordinator.send(name, Commit(job=prepare.job, epoch=0, step=12))
        await finish(coordinator, 0, "a", "b")
        assert built == [("b", 0), ("a", 2)]


async def test_two_neighbours_lost_at_once_replay_side_by_side(coordinator: FakeCoordinator, case: Case) -> None:
    expected = await undisturbed(coordinator, case, 4)
    backups = {0: "d", 1: "a", 2: "d", 3: "a"}
    async with pool(coordinator, "a", "b", "c", "d") as workers:
        prepare = await ready_job(coordinator, case, ("a", "b", "c", "d"), log_bytes=LOG, backups=backups)
        await snapshot(coordinator, prepare, backups, 12)
        for name in "abcd":
            coordinator.send(name, Commit(job=prepare.job, epoch=0, step=12))
        await end(workers[1])
        await end(workers[2])
        for name in ("a", "d"):
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", "a", "d", "d"), 12))
        await finish(coordinator, 1, "a", "d")
        assert_same(coordinator, expected)


async def test_an_heir_that_dies_before_anybody_has_reached_it_holds_nobody_up(
    coordinator: FakeCoordinator, case: Case
) -> None:
    """The others wait for its handshake until they hear of the next plan, not until their patience is at its end."""
    expected = await undisturbed(coordinator, case)
    async with pool(coordinator, "a", "b", "c", "d") as workers:
        prepare = await ready_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG, backups=BACKUPS)
        await snapshot(coordinator, prepare, BACKUPS, 12)
        for name in ("a", "b", "c"):
            coordinator.send(name, Commit(job=prepare.job, epoch=0, step=12))
        await end(workers[2])
        await end(workers[3])
        for epoch, heir in ((1, "d"), (2, "a")):
            for name in ("a", "b"):
                coordinator.send(name, adopt(prepare, coordinator, epoch, ("a", "b", heir), 12))
        async with asyncio.timeout(20):
            await coordinator.until(lambda: [m for m in coordinator.of("a", Adopted) if m.epoch == 2])
            await coordinator.until(lambda: [m for m in coordinator.of("b", Adopted) if m.epoch == 2])
        assert not [m for name in ("a", "b") for m in coordinator.of(name, Connected) if "d" in m.peers]
        await finish(coordinator, 2, "a", "b")
        assert_same(coordinator, expected)


async def test_before_the_first_snapshot_anybody_begins_at_the_start(coordinator: FakeCoordinator, case: Case) -> None:
    """And one that dies while it replays is replaced in turn."""
    expected = await undisturbed(coordinator, case)
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await start_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG)
        await coordinator.until(lambda: [m for m in coordinator.of("a", StepReport) if m.step >= 9])
        await end(workers[1])
        for name in ("a", "c"):
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", "c", "c"), 0))
        await coordinator.message("c", Adopted)
        await end(workers[2])
        coordinator.send("a", adopt(prepare, coordinator, 2, ("a", "a", "a"), 0))
        await finish(coordinator, 2, "a")
        assert_same(coordinator, expected)


async def test_a_lossy_edge_stays_lossy_when_both_ends_land_on_one_worker(coordinator: FakeCoordinator) -> None:
    case = make_case(Stack(dropout=0.0), clip=0.05, steps=STEPS)
    codecs = {0: CodecChoice(forward="int8", backward="bf16"), 1: CodecChoice(forward="bf16", backward="int8")}
    expected = await undisturbed(coordinator, case, 3, codecs)
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await start_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG, backups=BACKUPS, codecs=codecs)
        await coordinator.until(lambda: [m for m in coordinator.of("a", StepReport) if m.step >= 5])
        await end(workers[1])
        for name in ("a", "c"):
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", "c", "c"), 0))
        await finish(coordinator, 1, "a", "c")
        assert_same(coordinator, expected)


@pytest.mark.parametrize("adopter", ["a", "c"])
async def test_gradients_that_reuse_places_keep_every_bit_through_a_loss(
    coordinator: FakeCoordinator, adopter: str
) -> None:
    """The lost fragment's activations are made again, and so are its gradients at the places of what the others sent."""
    case = make_case(Stack(dropout=0.0), clip=0.05, steps=STEPS)
    reused = CodecChoice(forward="topk", backward="topk-reused", options={"ratio": 3.0})
    fed = reused.model_copy(update={"forward": "topk-sampled", "error_feedback": True})
    codecs = {0: reused, 1: fed}
    expected = await undisturbed(coordinator, case, 3, codecs)
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await start_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG, codecs=codecs)
        await coordinator.until(lambda: [m for m in coordinator.of("a", StepReport) if m.step >= 5])
        await end(workers[1])
        for name in ("a", "c"):
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", adopter, "c"), 0))
        await finish(coordinator, 1, "a", "c")
        assert_same(coordinator, expected)


async def test_fragments_move_at_a_step_boundary_without_replay(coordinator: FakeCoordinator, case: Case) -> None:
    """To a newcomer, and away from a worker that leaves."""
    expected = await undisturbed(coordinator, case)
    async with pool(coordinator, "a", "b", "n"):
        prepare = await ready_job(coordinator, case, ("a", "b", "b"), log_bytes=LOG, backups={0: "b", 1: "a", 2: "a"})
        newcomer = prepare.model_copy(update={"peers": addresses(coordinator, "a", "b")})
        coordinator.send("n", newcomer)
        for name in ("a", "b"):
            coordinator.send(name, Connect(job=prepare.job, peers=addresses(coordinator, "n")))
            assert (await coordinator.message(name, Connected)).peers == ["n"]
        await coordinator.message("n", Ready)
        at = 13
        await snapshot(coordinator, prepare, {0: "n", 1: "a", 2: "n"}, at, hold=True)
        for name in ("a", "b", "n"):
            coordinator.send(name, adopt(prepare, coordinator, 1, ("n", "b", "n"), at))
        assert (await coordinator.message("n", Adopted)).fragments == [0, 2]
        await finish(coordinator, 1, "b", "n")
        ran = {message.step for message in coordinator.of("n", StepReport)}
        assert ran == set(range(at + 1, STEPS + 1))
        assert_same(coordinator, expected)


async def b_is_lost_and_c_unconnected(coordinator: FakeCoordinator, case: Case, workers: Sequence[Running]) -> Prepare:
    """Three workers train, b ends, and a has no connection to c any more; returns the job's order."""
    prepare = await ready_job(coordinator, case, ("a", "b", "c"), log_bytes=LOG, backups=BACKUPS)
    await snapshot(coordinator, prepare, BACKUPS, 12)
    await end(workers[1])
    run = workers[0].service._run
    assert run is not None
    assert run._parts is not None
    await asyncio.to_thread(workers[0].service._mover.disconnect, run._parts.route, "c")
    return prepare


async def test_who_could_not_be_reached_when_the_plan_came_is_reached_later(
    coordinator: FakeCoordinator, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the network between two workers is down for a while, just then."""
    expected = await undisturbed(coordinator, case)
    tries: list[list[str]] = []

    def connect(mover: Mover, route: Route, peers: Sequence[PeerAddress], **rest: Any) -> list[str]:
        tries.append([peer.worker for peer in peers])
        if len(tries) <= 2:
            raise UnreachableError("can't reach c")
        return connect_now(mover, route, peers, **rest)

    connect_now = Mover.connect
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await b_is_lost_and_c_unconnected(coordinator, case, workers)
        monkeypatch.setattr(Mover, "connect", connect)
        for name in "ac":
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", "c", "c"), 12))
        await finish(coordinator, 1, "a", "c")
        assert_same(coordinator, expected)
    assert tries == [["c"]] * 3


async def test_who_is_still_being_tried_when_the_next_plan_comes_is_connected_to_for_that(
    coordinator: FakeCoordinator, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that is about to be given up, as its plan holds no more, is none."""
    expected = await undisturbed(coordinator, case)
    tries, waiting = 0, threading.Event()

    def connect(
        mover: Mover, route: Route, peers: Sequence[PeerAddress], *, cancelled: Callable[[], bool], **rest: Any
    ) -> list[str]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise UnreachableError("can't reach c")
        if tries == 2:
            peers = [peer.model_copy(update={"endpoint": "tcp://127.0.0.1:1"}) for peer in peers]

        def over() -> bool:
            if tries == 2:
                waiting.set()
            return cancelled()

        return connect_now(mover, route, peers, cancelled=over, **rest)

    connect_now = Mover.connect
    async with pool(coordinator, "a", "b", "c") as workers:
        prepare = await b_is_lost_and_c_unconnected(coordinator, case, workers)
        monkeypatch.setattr(Mover, "connect", connect)
        for name in "ac":
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", "c", "c"), 12))
        assert await asyncio.to_thread(waiting.wait, 20)
        for name in "ac":
            coordinator.send(name, adopt(prepare, coordinator, 2, ("a", "c", "c"), 12))
        async with asyncio.timeout(60):
            await finish(coordinator, 2, "a", "c")
        assert_same(coordinator, expected)


async def test_a_fragment_that_moved_away_takes_its_parameters_along(
    coordinator: FakeCoordinator, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the end of the job, but when the other workers go on."""
    built: list[list[weakref.ref[Tensor]]] = []

    def recorded(program: FragmentProgram, *rest: Any) -> Piece:
        if program.fragment.index == 1:
            built.append([weakref.ref(tensor) for tensor in program._parameters.values()])
        return Piece(program, *rest)

    def in_memory() -> list[bool]:
        return [any(tensor() is not None for tensor in tensors) for tensors in built]

    monkeypatch.setattr("worker.jobs.assembly.Piece", recorded)
    async with pool(coordinator, "a", "b"):
        prepare = await ready_job(coordinator, case, ("a", "b"), log_bytes=LOG, backups={1: "a"})
        await snapshot(coordinator, prepare, {0: "b", 1: "a"}, 13, hold=True)
        assert in_memory() == [True, True]  # On the one that trains it, and on the one that stands by.
        for name in ("a", "b"):
            coordinator.send(name, adopt(prepare, coordinator, 1, ("a", "a"), 13))
        await coordinator.message("b", Adopted)
        assert sorted(in_memory()) == [False, True]
        await finish(coordinator, 1, "a")


async def test_what_is_not_held_can_not_be_adopted(coordinator: FakeCoordinator, case: Case) -> None:
    async with pool(coordinator, "a", "b"):
        prepare = await start_job(coordinator, case, ("a", "b"), log_bytes=LOG)
        await coordinator.message("a", StepReport)
        coordinator.send("a", adopt(prepare, coordinator, 1, ("a", "a"), 4))
        refused = await coordinator.message("a", CantAdopt)
        assert refused.message == "no snapshot of fragment 1 after step 4 is held here"
