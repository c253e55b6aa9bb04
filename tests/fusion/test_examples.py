"""Every example spec can be captured as it stands, and the example topology fits them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.cli.predictions import predict
from fusion.submit import capture_job, read_job
from fusion.topology import load_topology

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_example(path):
    if "\nworkers:" in path.read_text():
        assert load_topology(path).workers
        return
    spec, base = read_job(path)
    job = capture_job(spec, base)
    assert job.data.manifest.train_samples >= spec.train.global_batch
    prediction = predict(job.dag, spec, load_topology(EXAMPLES / "two_cities.yaml"), policy="op-fence", codec="none")
    assert prediction["step_seconds"] > 0
