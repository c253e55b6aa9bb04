"""Workers of real processes die, stall, leave and come; the coordinator too. Losses and weights keep every bit."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from cases import all_cases
from runs import captured

from benchmarks.disturbed import FaultyPool, Outcome, Running, differences, joined
from fusion.submit import CapturedJob

pytestmark = pytest.mark.system

NAMES = ("w0", "w1", "w2", "w3")
TIMEOUT = 1.5
STEPS = 240


class Scene:
    """A captured job and what comes of it when nothing happens."""

    def __init__(
        self, folder: Path, name: str, steps: int, workers: Sequence[str] = NAMES[:1], **sections: dict[str, object]
    ) -> None:
        case = next(case for case in all_cases() if case.name == name)
        folder.mkdir()
        self.folder = folder
        self.job: CapturedJob = captured(
            case,
            folder,
            train={"steps": steps, "clip_grad_norm": 1.0, "eval_every": 20},
            checkpoint={"every": 40},
            fault_tolerance={"failure_timeout": TIMEOUT},
            # Every worker has a fragment at first; op-fence leaves some out where workers share few cores.
            **{"plan": {"fragments": 4, "policy": "equal-ops"}, **sections},
        )
        with FaultyPool(folder / "calm", workers) as pool:
            pool.wait_for_workers()
            self.calm = Running(pool, self.job).finish()


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Dropout, clipping, evaluation."""
    return Scene(tmp_path_factory.mktemp("gpt") / "job", "gpt-dropout", STEPS)


@contextmanager
def storm(scene: Scene, tmp_path: Path, workers: Sequence[str] = NAMES) -> Iterator[tuple[FaultyPool, Running]]:
    """The job on a pool in which things happen; it has begun to train."""
    with FaultyPool(tmp_path, workers) as pool:
        pool.wait_for_workers()
        run = Running(pool, scene.job)
        run.until_step(3)
        yield pool, run


def die(pool: FaultyPool, run: Running, worker: str, point: str) -> None:
    """The worker kills itself at this point, and the job gets over it: what was adopted has a second holder again."""
    losses = run.count("worker-lost")
    pool.fail_at(worker, point)
    run.until(lambda: not pool.alive(worker))
    # Its death may be seen before we have heard of the steps before it: what counts is what comes after the loss.
    run.until(lambda: run.ended or run.heard("worker-lost", losses + 1))
    at = run.step
    pool.forget(worker)
    run.until_step(at + 4)
    run.until(lambda: run.ended or run.common_step() > at or len(set(run.plan())) == 1)
    assert run.ended is None, "the job was over before the fault could be seen; give it more steps"


def same(scene: Scene, run: Running, **events: int) -> Outcome:
    """The bits are those of the calm run, and these events happened so often."""
    outcome = run.finish(120)
    assert differences(scene.calm, outcome) == [], run.story()
    assert {event: outcome.count(event) for event in events} == events, run.story()
    return outcome


def test_one_after_the_other_until_one_is_left_and_up_again(gpt: Scene, tmp_path: Path) -> None:
    """In forward, in backward, in the middle of an update; then three come back and get work again."""
    with storm(gpt, tmp_path) as (pool, run):
        first, last = run.plan()[0], run.plan()[-1]
        die(pool, run, first, "forward")
        die(pool, run, last, "backward")
        left = [name for name in NAMES if pool.alive(name)]
        die(pool, run, left[0], "update")
        assert set(run.plan()) == {left[1]}
        with pool.hold():
            for name in (first, last, left[0]):
                pool.start_again(name)
            run.until(lambda: len(joined(pool, NAMES)) == 4)
        run.until(lambda: run.ended or len(set(run.plan())) > 1)
        outcome = same(gpt, run, adoption=3, restarted=0)
        assert outcome.count("moved") > 0, run.story()


def test_between_update_and_report_while_its_snapshot_is_under_way_and_while_it_replays(
    gpt: Scene, tmp_path: Path
) -> None:
    with storm(gpt, tmp_path) as (pool, run):
        for point in ("report", "snapshot"):
            victim = run.plan()[1]
            die(pool, run, victim, point)
            pool.start_again(victim)
        victim, heir = run.plan()[2], run.backups()[2]
        pool.fail_at(heir, "replay")
        pool.fail_at(victim, "backward")
        run.until(lambda: not pool.alive(victim) and not pool.alive(heir))
        pool.start_again(heir)
        pool.start_again(victim)
        same(gpt, run)


def test_neighbours_at_once_and_a_worker_with_its_backup(gpt: Scene, tmp_path: Path) -> None:
    with storm(gpt, tmp_path) as (pool, run):
        run.until(lambda: run.common_step() > 0)
        one, other = run.plan()[1:3]
        pool.kill(one)
        pool.kill(other)
        run.until_step(run.step + 4)
        assert not run.heard("restarted"), run.story()
        with pool.hold():
            pool.start_again(one)
            pool.start_again(other)
            run.until(lambda: len(joined(pool, NAMES)) == 4)
            assert run.ended is None, "the job was over before its workers were back; give it more steps"
        # They may get fragments again before the next two die, or be all that is left then.
        victim, heir = run.plan()[0], run.backups()[0]
        pool.kill(victim)
        pool.kill(heir)
        outcome = same(gpt, run)
        # The two deaths are one loss or two, as they are noticed; with both goes the only copy of a fragment.
        assert outcome.count("restarted") >= 1, run.story()


def test_stalled_workers_wake_before_and_after_they_are_given_up(gpt: Scene, tmp_path: Path) -> None:
    """As with a partition that heals: in time nobody notices, too late the worker is refused and joins as new."""
    with storm(gpt, tmp_path) as (pool, run):
        early, late = run.plan()[0], run.plan()[2]
        pool.stall(early)
        at = run.step
        pool.wake(early)
        run.until_step(at + 3)
        assert not run.heard("worker-lost")
        pool.stall(late)
        run.until(lambda: run.heard("worker-lost"))
        run.until_step(run.step + 3)
        pool.wake(late)
        run.until(lambda: run.ended or len(joined(pool, NAMES)) == 4)
        pool.fail_at(early, "cut")
        same(gpt, run, adoption=1, **{"worker-lost": 1})


def test_the_coordinator_dies_and_a_worker_with_it(gpt: Scene, tmp_path: Path) -> None:
    """Training goes on meanwhile; what is lost meanwhile is adopted afterwards; nothing is told twice."""
    with storm(gpt, tmp_path) as (pool, run):
        pool.kill("coordinator")
        pool.start_coordinator()
        run.until_step(run.step + 3)
        run.until(lambda: run.common_step() > 0)
        victim = run.plan()[1]
        pool.kill("coordinator")
        pool.kill(victim)
        pool.start_coordinator()
        same(gpt, run, adoption=1, restarted=0)


def test_drain_and_sigterm_replay_nothing_and_everybody_gone_comes_back(gpt: Scene, tmp_path: Path) -> None:
    with storm(gpt, tmp_path) as (pool, run):
        drained, told = run.plan()[0], run.plan()[1]
        with pool.client() as client:
            client.drain(drained)
        assert pool.forget(drained) == 0
        pool.signal(told, signal.SIGTERM)
        assert pool.forget(told) == 0
        assert run.ended is None
        assert not {drained, told} & set(run.plan())
        assert not run.heard("adoption")
        assert not run.heard("replayed")
        rest = [name for name in NAMES if pool.alive(name)]
        for name in rest:
            pool.kill(name)
        run.until(lambda: run.heard("worker-lost", 2))
        for name in rest:
            pool.start_again(name)
        outcome = same(gpt, run)
        assert outcome.count("restarted") >= 1


def test_the_only_worker_of_a_job_dies_and_one_that_was_idle_holds_its_snapshots(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "job", "gpt-dropout", 500, plan={"fragments": 1})
    with storm(scene, tmp_path / "storm", NAMES[:2]) as (pool, run):
        run.until(lambda: run.ended or run.heard("stands-by"))
        at = run.step
        run.until(lambda: run.ended or run.common_step() > at)
        pool.kill(run.plan()[0])
        same(scene, run, adoption=1, restarted=0)


def test_lossy_codecs_error_feedback_and_batch_norm(tmp_path: Path) -> None:
    """The codecs of a plan are those of the edges that cross workers when it is made: as many workers for the calm run."""
    workers = NAMES[:3]
    plan: dict[str, object] = {"policy": "equal-ops", "fragments": 3}
    lossy = {"codec": "int4", "backward": "int3:stochastic=1", "error_feedback": True}
    scene = Scene(tmp_path / "job", "resnet-18", 30, workers, plan=plan, compression=lossy)
    with storm(scene, tmp_path / "storm", workers) as (pool, run):
        die(pool, run, run.plan()[1], "backward")
        outcome = same(scene, run, adoption=1)
        codecs = outcome.job["plan"]["codecs"].values()
        assert codecs
        assert all(codec["error_feedback"] for codec in codecs)
