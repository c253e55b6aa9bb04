"""A worker that is killed costs time, never bits: the job goes on from its checkpoint with the same cuts."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from cases import all_cases
from runs import assert_same_bits, captured, replanned, run, weights

from fusion.client import StreamItem
from fusion.local import LocalPool, LocalWorker, check_done
from fusion.submit import submit

pytestmark = pytest.mark.system


def test_killed_worker_changes_no_bit(tmp_path: Path) -> None:
    case = next(case for case in all_cases() if case.name == "gpt-dropout")
    with LocalPool(tmp_path, [LocalWorker(f"w{index}") for index in range(3)], dashboard=False) as pool:
        pool.wait_for_workers()
        job = captured(case, tmp_path, train={"steps": 60}, checkpoint={"every": 10})
        job = replanned(job, workers=2)
        undisturbed = run(pool, job)

        killed: list[str] = []

        def kill_one(item: StreamItem) -> None:
            if item.kind == "metrics" and item.data["step"] >= 13 and not killed:
                with pool.client() as client:
                    killed.append(client.job(made["id"])["plan"]["placement"][-1])
                os.kill(pool.process_ids()[killed[0]], signal.SIGKILL)

        with pool.client() as client:
            made = submit(client, job)
            ended = pool.watch(made["id"], kill_one)
            check_done(ended)
            metrics = client.metrics(made["id"])
            events = [event["event"] for event in client.events(made["id"])]

        assert killed
        assert "worker-lost" in events
        assert [metric["step"] for metric in metrics] == list(range(1, 61))
        assert [metric["loss"] for metric in metrics] == undisturbed.losses
        assert killed[0] not in ended["plan"]["placement"]
        assert_same_bits(weights(pool, made["id"], 60), undisturbed.state)
