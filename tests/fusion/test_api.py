"""The Python API in one process; training over processes is in test_local and tests/system."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusion
from fusion.data.entrypoint import read_object
from fusion.demo import write_demo
from fusion.errors import CaptureError, DataError, SpecError, UserError
from fusion.event_stream import StreamItem
from fusion.models import build_loss, build_model
from fusion.submit import capture_job, read_job, resume_from, weights_file
from fusion.trial import try_once


def test_capture():
    model = nn.Linear(3, 2)
    pair = (torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
    dag = fusion.capture(model, pair)
    assert {op.target for op in dag.placeholders} == {"inputs", "targets"}
    assert {parameter.name for parameter in dag.parameters} == {"weight", "bias"}
    named = fusion.capture(model, {"input": pair[0], "targets": torch.ones(4, 2)}, "mse")
    assert {op.target for op in named.placeholders} == {"input", "targets"}

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x).sum()

    assert [op.target for op in fusion.capture(Own(), pair[0], "model").placeholders] == ["inputs"]


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"optimizer": "adamm"}, SpecError, "fusion.train: train.optimizer.name: expected"),
        ({"steps": 0}, SpecError, "fusion.train: train.steps: input should be greater than 0"),
        ({"micro_batch": 3}, SpecError, "micro_batch 3 does not divide global_batch 4"),
        ({"data": {"inputs": torch.ones(4, 3)}}, DataError, "no key `targets` for the loss"),
        ({"model": None}, UserError, "model is a NoneType; it must be a torch.nn.Module"),
        ({"model": nn.Linear}, UserError, "model is the class Linear; make one"),
        ({"optimizer": torch.optim.SGD}, UserError, "optimizer must be a name"),
        ({"workers": "2"}, UserError, "workers must be a whole number from 1 on, got '2'"),
        (
            {"fault_tolerance": {"log_memory": 0}},
            SpecError,
            "fusion.train: fault_tolerance.log_memory: must be between",
        ),
        (
            {"verify": {"fraction": 2}},
            SpecError,
            "fusion.train: verify.fraction: input should be less than or equal to 1",
        ),
        ({"checkpoint": {"evry": 2}}, SpecError, "fusion.train: checkpoint.evry: unknown key 'evry'; did you mean"),
        ({"eval_batches": 0}, SpecError, "fusion.train: train.eval_batches: input should be greater than 0"),
        ({"holdout": 1.5}, UserError, "holdout is a share from 0 to below 1, got 1.5"),
    ],
)
def test_train_refuses_before_it_trains(changed, kind, message, tmp_path):
    options = {"data": (torch.ones(4, 3), torch.ones(4, 2)), "steps": 1, "global_batch": 4, "quiet": True} | changed
    model, data = options.pop("model", nn.Linear(3, 2)), options.pop("data")
    with pytest.raises(kind, match=message):
        fusion.train(model, "mse", data, folder=tmp_path, **options)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_no_ordinary_model_or_loss_is_refused():
    pair = (torch.ones(4, 3), torch.ones(4, 2))
    for model, loss, message in (
        (torch.jit.script(nn.Linear(3, 2)), "mse", "one of TorchScript"),
        (torch.compile(nn.Linear(3, 2)), "mse", "torch.compile made"),
        (nn.Linear, "mse", "the class Linear; make one"),
        (nn.Linear(3, 2), nn.MSELoss, r"the class MSELoss; make one, MSELoss\(\)"),
    ):
        with pytest.raises(CaptureError, match=message):
            fusion.capture(model, pair, loss)


def test_batches_are_no_samples():
    with pytest.raises(DataError, match="give its dataset instead"):
        read_object(DataLoader(TensorDataset(torch.ones(4, 3), torch.ones(4, 2))), "data")


class Remembers(nn.Linear):
    """Has state that is no tensor."""

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


def test_what_train_returns_where_losses_are_no_numbers_and_state_is_no_tensor(monkeypatch, tmp_path):
    model = Remembers(3, 2)
    trained = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}

    def pretend(pool, prepare, *, show, say, remark):
        for step, loss in enumerate((0.5, None), 1):
            show(StreamItem("metrics", {"step": step, "loss": loss, "step_seconds": 0.1}))
        save_file(trained, tmp_path / "model.safetensors")
        return SimpleNamespace(checkpoint=tmp_path, job={})

    monkeypatch.setattr("fusion.api.train_on", pretend)
    monkeypatch.setattr("fusion.api.LocalPool", lambda *_, **__: nullcontext())
    result = fusion.train(model, "mse", (torch.ones(4, 3), torch.ones(4, 2)), steps=2, global_batch=4, quiet=True)
    assert result.losses[0] == 0.5
    assert math.isnan(result.losses[1])
    assert torch.equal(model.weight, torch.ones(2, 3))


def test_the_demo_is_an_ordinary_job(tmp_path):
    path = write_demo(tmp_path / "job")
    spec, base = read_job(path)
    parameters = sum(parameter.numel() for parameter in build_model(spec, base).parameters())
    assert 1e6 < parameters < 3e6
    assert callable(build_loss(spec, base))
    job = capture_job(spec, base)
    assert job.data.manifest.samples > 1000
    assert job.dag.name == "demo-gpt"
    assert (path.parent / "text.txt").read_text().isascii() is not None


def test_tied_weights_travel(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    from safetensors.torch import load_file

    with weights_file({"a": weight, "b": weight, "part": weight[1], "turned": weight.T}) as (ref, path):
        loaded = load_file(path)
        assert ref.size == path.stat().st_size
    assert all(torch.equal(loaded[name], weight) for name in "ab")
    assert torch.equal(loaded["turned"], weight.T)
    assert not path.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": None}, "fusion.train: loss is a NoneType; it must be 'cross_entropy', 'mse', 'model' or a function"),
        (
            {"loss": "mse", "plan": "op-fence"},
            "fusion.train: plan: expected a mapping of keys to values, got 'op-fence'",
        ),
        ({"loss": "mse", "compression": "topk"}, "fusion.train: compression: expected a mapping"),
        ({"loss": "mse", "checkpoint": 5}, "fusion.train: checkpoint: expected a mapping"),
        ({"loss": "mse", "lr_schedule": 0.5}, "fusion.train: train.lr_schedule: expected a mapping"),
    ],
)
def test_options_of_another_kind_are_refused_in_words(given, message):
    with pytest.raises(UserError, match=message):
        fusion.train(nn.Linear(2, 2), data=(torch.ones(4, 2), torch.ones(4, 2)), steps=1, global_batch=2, **given)


class FakePool:
    url = "http://pool"

    def checkpoints(self, job):
        return [{"step": 4}, {"step": 8}] if job == "job-1" else []

    def upload_blob(self, ref, source):
        return True


def test_resume_points(tmp_path):
    from safetensors.torch import save_file

    from fusion.errors import UserError

    pool = FakePool()
    assert resume_from(pool, "job-1") == {"checkpoint": "job-1@8"}
    assert resume_from(pool, "job-1@4") == {"checkpoint": "job-1@4"}
    for wrong, message in (
        ("job-1@x", "is not a step"),
        ("job-1@²", "is not a step"),
        ("job-2", "has no checkpoint yet"),
        ("a/b", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            resume_from(pool, wrong)
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors", {"step": "12"})
    notes: list[str] = []
    found = resume_from(pool, str(tmp_path), notes.append)
    assert (found["step"], found["optimizer"], len(notes)) == (12, None, 1)
    save_file({"optimizer/m/w": torch.ones(2)}, tmp_path / "optimizer.safetensors", {"step": "12"})
    assert resume_from(pool, str(tmp_path / "model.safetensors"))["optimizer"] is not None
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        resume_from(pool, str(tmp_path))


def test_resume_points_at_a_url(tmp_path):
    """Of any store that fsspec knows; this one is in memory."""
    import fsspec
    from safetensors.torch import save_file

    from fusion.errors import UserError

    store = fsspec.filesystem("memory")
    for name, tensors in (("model", {"w": torch.ones(2)}), ("optimizer", {"optimizer/m/w": torch.ones(2)})):
        save_file(tensors, tmp_path / f"{name}.safetensors", {"step": "12"})
        store.put_file(str(tmp_path / f"{name}.safetensors"), f"/runs/gpt/12/{name}.safetensors")
    found = resume_from(FakePool(), "memory://runs/gpt/12")
    assert found["step"] == 12
    assert found["optimizer"] is not None
    notes: list[str] = []
    alone = resume_from(FakePool(), "memory://runs/gpt/12/model.safetensors", notes.append)
    assert (alone["model"], alone["optimizer"]) == (found["model"], None)
    assert "the optimizer's state starts from zero" in notes[-1]
    for url, message in (
        ("memory://runs/nothing", "memory://runs/nothing: no model.safetensors in this folder"),
        ("memory://runs/none.safetensors", "memory://runs/none.safetensors: no such file"),
        ("nonsense://x", "nonsense://x: can't be used: Protocol not known"),
    ):
        with pytest.raises(UserError, match=message):
            resume_from(FakePool(), url)


class Looked(nn.Module):
    """Batch norm and dropout around an embedding of four rows."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.drop = nn.Embedding(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x):
        found = self.table(x)
        return self.drop(self.norm(found))


def test_a_trial_leaves_no_trace():
    model = Looked()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    try_once(model, "mse", {"inputs": torch.tensor([0, 1, 3]), "targets": torch.ones(3, 3)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_names_the_line_and_the_data():
    with pytest.raises(CaptureError) as caught:
        try_once(Looked(), "mse", {"inputs": torch.tensor([0, 9]), "targets": torch.ones(2, 3)})
    message = str(caught.value)
    assert "test_api.py:" in message
    assert "IndexError: index out of range" in message
    assert "found = self.table(x)" in message
    assert "inputs int64 [2] from 0 to 9" in message
