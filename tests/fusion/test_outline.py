"""Capture without weights: the same OP-DAG, no real storage, and models that need real numbers all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dag.serialize import dumps
from fusion.errors import UserError
from fusion.outline import outline_job
from fusion.submit import capture_job, read_job

EXAMPLES = Path(__file__).parents[2] / "examples"
LARGE = 10**12
"""Elements of a parameter that no machine has room for: 4 TB."""

MODEL = f"""
import torch
from torch import nn

WEIGHTS = torch.arange(4.0)

class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn({LARGE} // 4, 4))
    def forward(self, inputs):
        return inputs @ self.weight[:8].t()

class Peeks(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)
        if self.linear.weight.abs().max().item() > 100 or WEIGHTS.is_meta:
            raise ValueError("a strange start")
    def forward(self, inputs):
        return self.linear(inputs) * WEIGHTS.sum()

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 8)
    def forward(self, inputs):
        rest = torch.tanh(inputs) * torch.tensor(0.5)
        if self.training:
            rest = rest * rest.new_empty(2, 1).bernoulli_(0.5)
        return self.linear(inputs + rest)

class Unseen(Deep):
    def forward(self, inputs):
        return super().forward(inputs) if self.training or inputs.sum() < 100 else inputs

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        raise ValueError("no such size")

def data(samples):
    for index in range(samples):
        if index >= 2 and samples == 16:
            raise ValueError("one micro-batch is enough")
        yield torch.zeros(4), torch.zeros(8)
"""


def job(folder: Path, model: str, **train):
    (folder / "outlined.py").write_text(MODEL)
    return read_job(
        {
            "model": {"entrypoint": f"outlined.py:{model}"},
            "loss": "mse",
            "data": {
                "entrypoint": "outlined.py:data",
                "args": {"samples": {"Peeks": 2, "Deep": 40, "Unseen": 40}.get(model, 16)},
            },
            "train": {"steps": 1, "global_batch": 2, "micro_batch": 2, **train},
        },
        folder,
    )


def small_gpt():
    spec, base = read_job(EXAMPLES / "gpt.yaml")
    model = spec.model.model_copy(update={"args": {"layers": 1, "width": 16, "heads": 2, "dropout": 0.1, "tied": True}})
    return spec.model_copy(update={"model": model}), base


def test_a_model_larger_than_memory_is_captured(tmp_path):
    dag = outline_job(*job(tmp_path, "Large"))
    assert sum(dag.ops[parameter.op].output_bytes for parameter in dag.parameters) == 4 * LARGE


def test_it_is_the_dag_of_the_real_thing(tmp_path):
    spec, base = small_gpt()
    assert dumps(outline_job(spec, base)) == dumps(capture_job(spec, base).dag)


def test_it_is_the_dag_of_the_real_thing_in_evaluation_too(tmp_path):
    spec, base = job(tmp_path, "Deep", eval_every=1)
    dag = outline_job(spec, base)
    assert dag.rewired
    assert dumps(dag) == dumps(capture_job(spec, base).dag)
    assert not outline_job(*job(tmp_path, "Deep")).rewired
    assert not outline_job(*job(tmp_path, "Unseen", eval_every=1)).rewired


def test_a_model_that_looks_at_its_weights_is_made_with_them(tmp_path):
    spec, base = job(tmp_path, "Peeks")
    assert dumps(outline_job(spec, base)) == dumps(capture_job(spec, base).dag)


def test_a_mistake_is_told_as_ever(tmp_path):
    with pytest.raises(UserError, match=r"outlined\.py:.*no such size"):
        outline_job(*job(tmp_path, "Broken"))


def test_no_real_storage_is_made(monkeypatch):
    """The weights of a small GPT never exist."""
    made: list[nn.Module] = []
    register = nn.Module.register_parameter

    def noted(module, name, parameter):
        made.extend([module] if parameter is not None and parameter.device != torch.device("meta") else [])
        register(module, name, parameter)

    monkeypatch.setattr(nn.Module, "register_parameter", noted)
    outline_job(*small_gpt())
    assert not made
