"""Every example spec can be captured as it stands, and the example topology fits them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.consumer_devices import topology
from fusion.cli.predictions import training_of
from fusion.outline import outline_job
from fusion.submit import capture_job, read_job
from fusion.topology import load_topology
from scheduler.compare import simulate_plan
from scheduler.devices import from_topology
from scheduler.taking_part import plan_for

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


@pytest.mark.parametrize(("name", "workers"), [("three_clusters", 48), ("thousand_devices", 1000)])
def test_topologies_of_the_paper_s_scale(name, workers):
    pool = load_topology(EXAMPLES / "paper_scale" / f"{name}.yaml")
    assert len(pool.workers) == workers
    rates = (
        [8 * pool.link("hong-kong-1", other)[0] for other in ("hong-kong-2", "frankfurt-1")] if workers == 48 else []
    )
    assert rates in ([], [1e10, 2e7])


def test_the_thousand_devices_are_what_their_script_writes():
    assert (EXAMPLES / "paper_scale" / "thousand_devices.yaml").read_text() == topology(1000, 0)


@pytest.mark.parametrize("name", ["gpt2_xl", "resnet101"])
def test_jobs_of_the_paper_s_scale(name):
    """Read and checked with small models in place of theirs, which take half a minute to trace."""
    spec, base = read_job(EXAMPLES / "paper_scale" / f"{name}.yaml")
    smaller = {"layers": 1, "width": 50} if name == "gpt2_xl" else {"depth": 18, "width": 4}
    model = spec.model.model_copy(update={"args": spec.model.args | smaller})
    dag = outline_job(spec.model_copy(update={"model": model}), base)
    assert dag.loss.requires_grad
