"""What is trained over slow networks: the yardstick GPT on real text, and a ResNet-18 on real digits, as job specs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, Workload, write_text
from fusion.errors import DataError
from fusion.submit import CapturedJob, capture_job, read_job
from fusion.user_code import load_entrypoint

YARDSTICK = Workload(vocabulary=512, sequence_length=128, micro_batches=8, micro_batch=4)
BATCHES = {"gpt": YARDSTICK, "resnet": Workload(micro_batches=8, micro_batch=8)}
"""Of the ResNet, the batch only."""
MODELS = tuple(BATCHES)
DESCRIBED = {
    "gpt": YARDSTICK.describe(),
    "resnet": "ResNet-18 of width 16 on digits of 16x16 pixels, 8 micro-batches of 8",
}
_EXAMPLES = ROOT / "examples"
_OPTIMIZER: dict[str, dict[str, Any]] = {
    "gpt": {"name": "adamw", "lr": 1.0e-3},
    "resnet": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
}
_WARM_UP = 20


def job_spec(model: str, data: Mapping[str, Any], steps: int, **train: Any) -> dict[str, Any]:
    """The spec of `gpt` or `resnet` on this `data`; `train` goes before what is usual.

    The learning rate is constant after a warm-up, so that losses in the middle of two runs can be compared.
    """
    usual = {
        "steps": steps,
        "optimizer": _OPTIMIZER[model],
        "lr_schedule": {"name": "constant", "warmup": _WARM_UP},
    }
    batch = BATCHES[model]
    if model == "gpt":
        spec: dict[str, Any] = replace(batch, steps=steps).job(Path(data["text"]))
    else:
        file = _EXAMPLES / "models" / "resnet.py"
        spec = {
            "model": {
                "entrypoint": f"{file}:build",
                "args": {"depth": 18, "channels": 1, "classes": 10, "width": 16},
            },
            "loss": {"entrypoint": f"{file}:loss"},
            "train": {"global_batch": batch.global_batch, "micro_batch": batch.micro_batch},
        }
    spec["name"] = model
    spec["data"] = {**spec.get("data", {}), **data}
    spec["train"] |= usual | train
    return spec


def captured(model: str, data: Mapping[str, Any], steps: int, **train: Any) -> CapturedJob:
    return captured_from(job_spec(model, data, steps, **train))


def captured_from(spec: Mapping[str, Any]) -> CapturedJob:
    return capture_job(*read_job(spec))


def data_of(model: str, folder: Path, part: slice = slice(None), text: Path | None = None) -> dict[str, Any]:
    """The `data` section for a part of the model's samples, in the order in which they stand; files go into `folder`.

    `text` stands in for the text that every CPython carries.
    """
    name = f"{model}-{part.start}-{part.stop}"
    if model == "gpt":
        letters = (text or write_text(folder)).read_bytes()
        file = folder / f"{name}.txt"
        file.write_bytes(letters[_within(part, len(letters))])
        return {"text": str(file)}
    samples = _digits()
    file = folder / f"{name}.npz"
    np.savez(file, **{key: array[_within(part, len(array))] for key, array in samples.items()})
    return {"arrays": str(file)}


def _within(part: slice, length: int) -> slice:
    """A slice that is given in shares of the whole, or not at all."""
    start, stop = (None if share is None else round(share * length) for share in (part.start, part.stop))
    return slice(start, stop)


def _digits() -> dict[str, Any]:
    entrypoint = load_entrypoint(f"{_EXAMPLES / 'data' / 'digits.py'}:dataset", ROOT, where="digits", error=DataError)
    images, classes = entrypoint(size=16).tensors
    return {"inputs": images.numpy(), "targets": classes.numpy()}
