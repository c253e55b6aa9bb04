"""Every example spec can be captured as it stands, and the example topology fits them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.cli.predictions import training_of
from fusion.submit import capture_job, read_job
from fusion.topology import load_topology
from scheduler.compare import plan_for, simulate_plan
from scheduler.devices import from_topology

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_example(path):
    if "\nworkers:" in path.read_text():
        assert load_topology(path).workers
        return
    spec, base = read_job(path)
    job = capture_job(spec, base)
    assert job.data.manifest.train_samples >= spec.train.global_batch
    devices, network = from_topology(load_topology(EXAMPLES / "two_cities.yaml"))
    training = training_of(spec)
    plan = plan_for(job.dag, devices, network, training, "op-fence", spec.compression)
    assert simulate_plan(job.dag, plan, devices, network, training).step_seconds > 0
