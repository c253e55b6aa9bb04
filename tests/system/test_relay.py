"""Workers that can't reach each other train over a relay, with the same bits, also when the relay dies; and it is shown."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from cases import all_cases
from runs import assert_same_bits, captured, in_one_process, replanned
from torch import Tensor

from benchmarks.disturbed import Outcome, Running
from benchmarks.placed_pool import PlacedPool
from benchmarks.shaping import ShapedNetwork
from fusion.local import LocalPool, LocalWorker
from fusion.submit import CapturedJob

pytestmark = pytest.mark.system

Plain = tuple[list[float], dict[str, Tensor]]

STEPS = 12
TIMEOUT = 5.0


CASE = next(case for case in all_cases() if case.name == "gpt-untied")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> CapturedJob:
    return captured(
        CASE,
        tmp_path_factory.mktemp("job"),
        train={"steps": STEPS, "clip_grad_norm": CASE.clip},
        plan={"fragments": 3},
        fault_tolerance={"failure_timeout": TIMEOUT},
    )


@pytest.fixture(scope="module")
def plain() -> Plain:
    """Losses and weights of one process without any network."""
    return in_one_process(CASE, STEPS)


class HiddenPool(LocalPool):
    """A pool whose workers are given further arguments: addresses where nobody listens, a relay."""

    def __init__(self, folder: Path, more: dict[str, list[str]]) -> None:
        self._more = more
        workers = [LocalWorker(name) for name in more if name != "coordinator"]
        super().__init__(folder, workers, dashboard=False)

    def _spawn(self, name: str, arguments: Sequence[str], **options: Any) -> Any:
        return super()._spawn(name, [*arguments, *self._more.get(name, [])], **options)


def relayed(pool: LocalPool) -> dict[tuple[str, str], str]:
    """Link -> who offers the relay that it goes over, as `fusion workers --links` has it."""
    with pool.client() as client:
        return {(link["from"], link["to"]): link["relay"] for link in client.links() if link["relay"]}


def measured(pool: LocalPool) -> dict[tuple[str, str], dict[str, Any]]:
    """The links, once something is known of their speed."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    deadline = time.monotonic() + 60
    with pool.client() as client:
        while not found or any(link["bytes_per_second"] is None for link in found.values()):
            assert time.monotonic() < deadline, found
            found = {(link["from"], link["to"]): link for link in client.links()}
    return found


def assert_same(outcome: Outcome, plain: Plain) -> None:
    assert [outcome.losses[step] for step in range(1, STEPS + 1)] == plain[0]
    assert_same_bits(outcome.weights, plain[1])
    assert outcome.repeated == []


def hidden(number: int) -> list[str]:
    # Below those that the system hands out by itself.
    port = 20_000 + (7 * os.getpid() + number) % 10_000
    return ["--advertise", f"127.0.0.9:{port}", "--listen", "127.0.0.1"]


def test_a_relay_that_a_worker_offers_dies_in_the_middle_of_a_job(
    job: CapturedJob, plain: Plain, tmp_path: Path
) -> None:
    more = {"coordinator": ["--no-relay"], "w0": hidden(0), "w1": hidden(1), "w2": ["--relay"]}
    with HiddenPool(tmp_path, more) as pool:
        pool.wait_for_workers()
        running = Running(pool, replanned(job, workers=3))
        running.until_step(3)
        over = relayed(pool)
        pairs = [("w0", "w1"), ("w0", "w2"), ("w1", "w2")]
        assert over == {ends: "w2" for one, other in pairs for ends in ((one, other), (other, one))}, running.story()
        (relay,) = psutil.Process(pool.process_ids()["w2"]).children()
        relay.kill()
        outcome = running.finish()
        assert outcome.count("worker-lost", "adoption", "restarted") == 0, running.story()
        assert_same(outcome, plain)


@pytest.mark.usefixtures("shaped_links")
def test_two_networks_that_let_nobody_in_meet_at_the_coordinator(
    job: CapturedJob, plain: Plain, tmp_path: Path
) -> None:
    with ShapedNetwork(("w0", "w1"), 100e6) as network:
        network.keep_apart("w0", "w1")
        with PlacedPool(tmp_path, ("w0", "w1"), network) as pool:
            pool.wait_for_workers()
            links = measured(pool)
            assert_same(Running(pool, replanned(job, workers=2)).finish(), plain)
    assert set(links) == {("w0", "w1"), ("w1", "w0")}
    for link in links.values():
        assert (link["relay"], link["error"]) == ("the coordinator", None)
        assert 0 < link["bytes_per_second"] <= 1.5 * 100e6 / 8
