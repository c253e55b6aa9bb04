"""What real workers measure, and what becomes of a worker that lies about its speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.local import LocalPool, LocalWorker, check_done
from fusion.spec_file import spec_from
from fusion.submit import capture_job, submit

pytestmark = pytest.mark.system

WIDTH, SAMPLES = 768, 256


MODEL = f"""
from torch import nn

def build():
    blocks = []
    for _ in range(4):
        blocks += [nn.Linear({WIDTH}, {4 * WIDTH}), nn.ReLU(), nn.Linear({4 * WIDTH}, {WIDTH})]
    return nn.Sequential(*blocks, nn.Linear({WIDTH}, 10))
"""


def test_a_worker_that_lies_is_found_out_and_links_show_what_the_job_sent(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    noise = np.random.default_rng(0)
    inputs = noise.normal(size=(SAMPLES, WIDTH)).astype("float32")
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=noise.integers(0, 10, SAMPLES))
    spec = spec_from(
        {
            "name": "liar",
            "model": {"entrypoint": f"{tmp_path / 'model.py'}:build"},
            "loss": "cross_entropy",
            "data": {"arrays": str(tmp_path / "data.npz")},
            # Too few steps for another placement: what is asked for comes to nothing.
            "train": {"steps": 9, "global_batch": SAMPLES, "micro_batch": 64, "optimizer": {"name": "sgd", "lr": 0.01}},
            "plan": {"policy": "equal-ops", "fragments": 2, "workers": 2},
        }
    )
    job = capture_job(spec, tmp_path)
    workers = [LocalWorker("honest"), LocalWorker("liar", speed=1e13)]
    events: list[dict[str, Any]] = []
    with LocalPool(tmp_path / "pool", workers, dashboard=False) as pool, pool.client() as client:
        pool.wait_for_workers()
        described = {worker["name"]: worker["device"] for worker in client.workers()}
        submitted = submit(client, job)
        ended = pool.watch(submitted["id"], lambda item: events.append(item.data) if item.kind == "event" else None)
        check_done(ended)
        links = client.links()
    assert (described["liar"]["flops_per_second"], described["liar"]["declared"]) == (1e13, True)
    assert min(described["honest"][rate] for rate in ("flops_per_second", "bytes_per_second")) > 0
    found = next(event for event in events if event["event"] == "speed-corrected" and event["worker"] == "liar")
    assert found["slower"] > 3
    assert "times slower than the others, by what each said (1e+13 FLOP/s)" in found["message"]
    assert all(link["error"] is None for link in links)
