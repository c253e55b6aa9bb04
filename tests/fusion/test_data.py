"""Data of every kind becomes a blob and a manifest, and what does not fit is told: what, where, what to do."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load
from torch import nn

from fusion.data import prepare, prepare_object
from fusion.errors import DataError
from fusion.spec import DataSpec, TrainSpec

TRAIN = TrainSpec(steps=1, global_batch=4, micro_batch=2)
EVALUATING = TrainSpec(steps=1, global_batch=4, micro_batch=2, eval_every=1)


def plain(inputs):
    return inputs


def ready(base: Path, spec: dict, train: TrainSpec = TRAIN, forward=plain, own_loss: bool = False):
    made = TypeAdapter(DataSpec).validate_python(spec)
    return prepare(made, train, base, forward=forward, loss_is_the_models=own_loss)


def problem(*args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        ready(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Text


def test_text_by_bytes(tmp_path):
    text = bytes(range(33)) + b"rest"
    (tmp_path / "a.txt").write_bytes(text)
    data = ready(tmp_path, {"text": "a.txt", "sequence_length": 8})
    manifest = data.manifest
    assert (manifest.kind, manifest.samples, manifest.train_samples, manifest.sequence_length) == ("tokens", 4, 4, 8)
    assert manifest.feeds == {"inputs": "inputs", "targets": "targets"}
    tokens = load(data.blob)["tokens"]
    assert (tokens.dtype, data.example["inputs"].dtype) == (torch.uint8, torch.int64)
    assert bytes(tokens.tolist()) == text
    assert data.example["inputs"].tolist() == [list(range(8)), list(range(8, 16))]
    assert data.example["targets"].tolist() == [list(range(1, 9)), list(range(9, 17))]
    assert manifest.blob.size == len(data.blob)


def test_a_model_with_its_own_loss_shifts_by_itself(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 100)

    def forward(input_ids=None, attention_mask=None, labels=None):
        return None

    data = ready(tmp_path, {"text": "a.txt", "sequence_length": 8}, forward=forward, own_loss=True)
    assert data.manifest.feeds == {"input_ids": "inputs", "labels": "inputs"}
    first, second = data.example["input_ids"], data.example["labels"]
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr(), "one tensor for both would be captured as one placeholder"
    message = problem(tmp_path, {"text": "a.txt", "sequence_length": 8}, own_loss=True)
    assert "forward takes `input_ids` and `labels`" in message


def test_text_with_a_tokenizers_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("a b a c " * 4)
    data = ready(tmp_path, {"text": "a.txt", "tokenizer": "words.json", "sequence_length": 4})
    assert load(data.blob)["tokens"].tolist() == [0, 1, 0, 2] * 4
    (tmp_path / "bad.json").write_text("{}")
    spec = {"text": "a.txt", "sequence_length": 4}
    assert "not a `tokenizers` JSON file" in problem(tmp_path, {**spec, "tokenizer": "bad.json"})
    assert "no such file" in problem(tmp_path, {**spec, "tokenizer": "none.json"})
    (tmp_path / "a.txt").write_bytes(b"\xff" * 50)
    assert "not UTF-8 text (byte 0)" in problem(tmp_path, {**spec, "tokenizer": "words.json"})


def test_bad_text(tmp_path):
    assert "no such file" in problem(tmp_path, {"text": "a.txt"})
    (tmp_path / "a.txt").write_bytes(b"x" * 8)
    message = problem(tmp_path, {"text": "a.txt", "sequence_length": 8})
    assert "8 tokens, but one sample of sequence_length 8 needs 9; give more text" in message
    (tmp_path / "a.txt").write_bytes(b"x" * 9)
    assert "1 sample to train on, fewer than one micro-batch of 2" in problem(
        tmp_path, {"text": "a.txt", "sequence_length": 8}
    )


# Arrays


def save(base: Path, **arrays) -> dict:
    np.savez(base / "data.npz", **arrays)
    return {"arrays": "data.npz"}


def test_arrays_and_their_dtypes(tmp_path):
    spec = save(tmp_path, inputs=np.ones((6, 3)), targets=np.arange(6, dtype=np.int32))
    data = ready(tmp_path, spec)
    tensors = load(data.blob)
    assert (tensors["inputs"].dtype, tensors["targets"].dtype) == (torch.float32, torch.uint8)
    assert [tensor.dtype for tensor in data.example.values()] == [torch.float32, torch.int64]
    assert {name: tuple(tensor.shape) for name, tensor in data.example.items()} == {"inputs": (2, 3), "targets": (2,)}
    assert (data.manifest.kind, data.manifest.samples, data.manifest.train_samples) == ("arrays", 6, 6)


@pytest.mark.parametrize(
    ("least", "greatest", "stored"),
    [
        (0, 255, torch.uint8),
        (-100, 127, torch.int8),
        (-100, 128, torch.int16),
        (0, 50_256, torch.int32),
        (-1, 2**31, torch.int64),
    ],
)
def test_integers_are_stored_in_the_smallest_dtype(tmp_path, least, greatest, stored):
    values = np.array([least, greatest, 1, 2])
    tensors = load(ready(tmp_path, save(tmp_path, inputs=np.ones((4, 3)), targets=values)).blob)
    assert tensors["targets"].dtype == stored
    assert tensors["targets"].tolist() == values.tolist()


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", ">u2", "u4", "i8", "u8", ">u8"])
def test_integers_of_every_kind_are_fed_as_int64(tmp_path, kind):
    spec = save(tmp_path, inputs=np.ones((4, 3)), targets=np.array([0, 1, 2, 100], dtype=kind))
    assert ready(tmp_path, spec).example["targets"].tolist() == [0, 1]
    assert ready(tmp_path, spec).example["targets"].dtype == torch.int64


def test_npy_files_by_key(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((4, 2), dtype=np.float16))
    np.save(tmp_path / "y.npy", np.array([True] * 4))
    data = ready(tmp_path, {"arrays": {"inputs": "x.npy", "targets": "y.npy"}})
    assert [tensor.dtype for tensor in data.example.values()] == [torch.float16, torch.bool]
    assert "holds one array; give an .npz file" in problem(tmp_path, {"arrays": "x.npy"})


def test_the_holdout_needs_eval_every(tmp_path):
    spec = {**save(tmp_path, inputs=np.ones((20, 3)), targets=np.ones(20)), "holdout": 0.25}
    assert ready(tmp_path, spec).manifest.train_samples == 20
    manifest = ready(tmp_path, spec, EVALUATING).manifest
    assert (manifest.samples, manifest.train_samples) == (20, 15)
    message = problem(tmp_path, {**spec, "holdout": 0.05}, EVALUATING)
    assert "holdout 0.05 of 20 samples keeps 1 for evaluation, fewer than one micro-batch of 2" in message


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"inputs": np.ones((4, 2)), "targets": np.ones(5)},
            "must be equal for all keys, but: inputs (4, 2), targets (5,)",
        ),
        ({"inputs": np.ones((1, 2)), "targets": np.ones(1)}, "1 sample to train on, fewer than one micro-batch of 2"),
        ({"inputs": np.ones((4, 2))}, "no key `targets` for the loss (keys: inputs)"),
        ({"targets": np.ones(4)}, "no key 'inputs' for the model's forward"),
        ({"imputs": np.ones((4, 2)), "targets": np.ones(4)}, "no argument 'imputs'; did you mean 'inputs'?"),
        ({"inputs": np.ones(4, dtype=complex), "targets": np.ones(4)}, "inputs: dtype complex128 can't be fed"),
        (
            {"inputs": np.ones((4, 2)), "targets": np.array([1, 2, 3, 2**63], dtype="u8")},
            "targets: holds integers of 2^63",
        ),
        ({"inputs": np.array(["a"] * 4), "targets": np.ones(4)}, "can't be fed to a model; give floats"),
        ({"inputs": np.float32(3), "targets": np.ones(4)}, "inputs is a single number"),
        ({"inputs": np.array([{}, 1], dtype=object)}, "it holds Python objects, which are not read"),
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    assert message in problem(tmp_path, save(tmp_path, **arrays))


def test_unreadable_arrays(tmp_path):
    assert "no such file" in problem(tmp_path, {"arrays": "data.npz"})
    for content, message in (
        (b"", "not a readable .npz or .npy file"),
        (b"PK\x03\x04broken", "not a readable .npz or .npy file"),
        (b"hello world", "not an .npz or .npy file; write one"),
        (pickle.dumps({"inputs": [1, 2]}), "it holds Python objects, which are not read"),
    ):
        (tmp_path / "data.npz").write_bytes(content)
        told = problem(tmp_path, {"arrays": "data.npz"})
        assert message in told
        assert "data.npz" in told


def test_names_of_forwards_arguments(tmp_path):
    def forward(image, mask=None):
        return image

    spec = save(tmp_path, image=np.ones((4, 2)), mask=np.ones(4), targets=np.ones(4))
    assert ready(tmp_path, spec, forward=forward).manifest.feeds.keys() == {"image", "mask", "targets"}
    message = problem(tmp_path, save(tmp_path, mask=np.ones(4), targets=np.ones(4)), forward=forward)
    assert "no key 'image' for the model's forward" in message


# Entrypoints and objects


class Pairs(torch.utils.data.Dataset):
    def __init__(self, size: int = 5) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        return torch.full((3,), float(index)), index


def of_object(data, train: TrainSpec = TRAIN, **kwargs):
    return prepare_object(data, train, forward=plain, loss_is_the_models=False, **kwargs)


@pytest.mark.parametrize(
    "data",
    [
        Pairs(),
        [(torch.full((3,), float(i)), i) for i in range(5)],
        ({"inputs": [float(i)] * 3, "targets": i} for i in range(5)),
        {"inputs": np.arange(5.0)[:, None].repeat(3, 1), "targets": torch.arange(5)},
        (torch.arange(5.0)[:, None].repeat(1, 3), np.arange(5)),
        torch.utils.data.TensorDataset(torch.arange(5.0)[:, None].repeat(1, 3), torch.arange(5)),
    ],
    ids=["dataset", "list", "generator", "mapping", "pair", "tensors"],
)
def test_objects(data):
    tensors = load(of_object(data).blob)
    assert torch.equal(tensors["inputs"], torch.arange(5.0)[:, None].repeat(1, 3))
    assert torch.equal(tensors["targets"], torch.arange(5))


@pytest.mark.parametrize("shift", [0, 1])
def test_inputs_and_targets_of_one_memory(shift):
    """An autoencoder's targets are its inputs, a forecaster's are a part of the same series."""
    series = torch.arange(6.0)
    data = of_object({"inputs": series[: 6 - shift], "targets": series[shift:]})
    assert load(data.blob)["inputs"].tolist() == series[: 6 - shift].tolist()
    assert load(data.blob)["targets"].tolist() == series[shift:].tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "gave no samples"),
        (7, "returned a int; return a torch Dataset, an iterable of samples"),
        ([(1, 2), (1, 2, 3)], "sample 1: has 3 parts"),
        ([torch.ones(4, 2), torch.ones(4)], "is read as two samples; all inputs and all targets go into a"),
        (([[1.0], [2.0], [3.0]], [0, 1, 2]), "is read as two samples"),
        ([{"inputs": 1.0, "targets": 1}, {"inputs": 1.0}], "sample 1 has inputs, the first has inputs, targets"),
        ([([1.0], 1), ([1.0, 2.0], 1)], "sample 1: inputs is float32(2,), the first sample's is float32(1,)"),
        ([("a", 1)], "sample 0: inputs: dtype <U1 can't be fed"),
        ([([[1], [1, 2]], 1)], "is not one array"),
        (torch.ones(4, 2).to_sparse(), "is a sparse_coo tensor"),
    ],
)
def test_bad_objects(data, message):
    with pytest.raises(DataError) as caught:
        of_object(data)
    assert message in str(caught.value)


def test_entrypoint(tmp_path):
    (tmp_path / "rows.py").write_text(
        "import torch\n\ndef dataset(size):\n    return [(torch.ones(2) * i, i) for i in range(size)]\n\n"
        "def broken():\n    yield torch.ones(2), 1\n    raise ValueError('row 1 is bad')\n"
    )
    data = ready(tmp_path, {"entrypoint": "rows.py:dataset", "args": {"size": 9}, "limit": 6})
    assert data.manifest.samples == 6
    message = problem(tmp_path, {"entrypoint": "rows.py:broken"})
    assert "sample 1 can't be read" in message
    assert "rows.py:8: ValueError: row 1 is bad" in message
    assert "did you mean 'dataset'" in problem(tmp_path, {"entrypoint": "rows.py:datset"})


def test_an_index_error_in_a_dataset_does_not_end_it_silently():
    class Broken(Pairs):
        def __getitem__(self, index: int):
            return [1, 2][index], 0

    with pytest.raises(DataError, match="sample 2 can't be read"):
        of_object(Broken())


class Short(Sequence[Any]):
    """Iterating it would stop at the error."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        return [(1, 0), (2, 0)][index]


class NeverBegins:
    def __iter__(self) -> Any:
        raise KeyError("index")


class NoLength:
    def __len__(self) -> int:
        raise RuntimeError("not downloaded")

    def __getitem__(self, index: int) -> Any:
        return 1, 0


class NoArray:
    def __array__(self, *args: Any, **settings: Any) -> Any:
        raise RuntimeError("truncated image")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (Short(), "data: sample 2 can't be read: .*IndexError: list index out of range"),
        (NeverBegins(), "data: sample 0 can't be read: .*KeyError: 'index'"),
        (NoLength(), "data: sample 0 can't be read: .*RuntimeError: not downloaded"),
        ([(1, 0), (NoArray(), 0)], "data: sample 1: inputs: can't be made an array: RuntimeError: truncated image"),
    ],
)
def test_an_error_of_the_user_s_names_the_sample(data: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        of_object(data)


# Hugging Face


def test_hugging_face(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    spec = {"hf": "some/corpus", "sequence_length": 4}
    assert "needs the `datasets` package; pip install 'fusion-train[hf]'" in problem(tmp_path, spec)

    class Rows(list):
        column_names = ("text",)

    def load_dataset(name, config, split):
        if name != "some/corpus":
            raise FileNotFoundError(f"no dataset {name}")
        return Rows({"text": "abc"} for _ in range(9))

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = ready(tmp_path, {**spec, "limit": 5})
    assert bytes(load(data.blob)["tokens"].tolist()) == b"abc\nabc\nabc\nabc\nabc"
    assert "has no column 'body'; it has text" in problem(tmp_path, {**spec, "column": "body"})
    assert "can't load split 'train': no dataset other" in problem(tmp_path, {**spec, "hf": "other"})


def test_any_argument_is_taken_by_a_model_that_takes_any():
    class Any(nn.Module):
        def forward(self, **named):
            return named["weird"]

    data = prepare_object(
        {"weird": torch.ones(4, 2), "targets": torch.ones(4)}, TRAIN, forward=Any().forward, loss_is_the_models=False
    )
    assert data.manifest.feeds == {"weird": "weird", "targets": "targets"}
