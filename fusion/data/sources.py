"""From the `data` section of a job spec, or from objects in memory, to prepared data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion.data.arrays import read_arrays
from fusion.data.entrypoint import read_entrypoint, read_object
from fusion.data.feeds import feeds_for
from fusion.data.hugging_face import read_hugging_face
from fusion.data.prepared import PreparedData, RawData, assemble
from fusion.data.text import read_text
from fusion.spec import ArraysData, DataSpec, EntrypointData, TextData, TrainSpec


def prepare(
    spec: DataSpec, train: TrainSpec, base: Path, *, forward: Callable[..., Any], loss_is_the_models: bool
) -> PreparedData:
    """Read the data that a spec names. `forward` is the model's, whose arguments the keys must fit. Raises `DataError`."""
    return _prepared(_read(spec, base), train, forward, loss_is_the_models)


def prepare_object(
    data: Any, train: TrainSpec, *, holdout: float = 0.1, forward: Callable[..., Any], loss_is_the_models: bool
) -> PreparedData:
    """The same for data in memory: a mapping of arrays, an (inputs, targets) pair, a `Dataset`, or samples."""
    return _prepared(read_object(data, "data", holdout=holdout), train, forward, loss_is_the_models)


def _prepared(raw: RawData, train: TrainSpec, forward: Callable[..., Any], loss_is_the_models: bool) -> PreparedData:
    return assemble(raw, train, feeds_for(raw, forward, loss_is_the_models))


def _read(spec: DataSpec, base: Path) -> RawData:
    if isinstance(spec, TextData):
        return read_text(spec, base)
    if isinstance(spec, ArraysData):
        return read_arrays(spec, base)
    if isinstance(spec, EntrypointData):
        return read_entrypoint(spec, base)
    return read_hugging_face(spec, base)
