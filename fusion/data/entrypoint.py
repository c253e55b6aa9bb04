"""A torch `Dataset`, or any iterable of samples, turned into arrays once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion.data.arrays import arrays_of, to_tensor
from fusion.data.prepared import RawData
from fusion.errors import DataError, FusionError
from fusion.progress import counting
from fusion.spec import EntrypointData
from fusion.user_code import explain, load_entrypoint


def read_entrypoint(spec: EntrypointData, base: Path) -> RawData:
    """Call the user's function and read the samples that it returns. Raises `DataError`."""
    entrypoint = load_entrypoint(spec.entrypoint, base, where="data.entrypoint", error=DataError)
    where = f"data.entrypoint {spec.entrypoint!r}"
    return read_object(entrypoint(**spec.args), where, limit=spec.limit, holdout=spec.holdout, folder=entrypoint.folder)


def read_object(
    data: Any, where: str, *, limit: int | None = None, holdout: float = 0.0, folder: Path | None = None
) -> RawData:
    """Arrays from a mapping of arrays, an (inputs, targets) pair of arrays, a `Dataset`, or an iterable of samples.

    A sample is a tensor (`inputs`), a pair (`inputs`, `targets`), or a mapping by placeholder. Raises `DataError`.
    """
    if isinstance(data, Mapping):
        return arrays_of(_limited(data, limit), where, holdout)
    if isinstance(data, Tensor | np.ndarray):
        return arrays_of(_limited({"inputs": data}, limit), where, holdout)
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor | np.ndarray) for part in data):
        return arrays_of(_limited({"inputs": data[0], "targets": data[1]}, limit), where, holdout)
    if isinstance(data, torch.utils.data.DataLoader):
        raise DataError(f"{where}: is a DataLoader, whose batches would each be one sample; give its dataset instead")
    if _all_inputs_and_all_targets(data):
        raise DataError(
            f"{where}: is read as two samples; all inputs and all targets go into a tuple (inputs, targets) of two tensors or "
            "numpy arrays"
        )
    columns: dict[str, list[Tensor]] = {}
    samples = _samples(data, where)
    total = _length(data)
    if limit is not None:
        total = limit if total is None else min(total, limit)
    count = 0
    numbered = _guarded(samples, where, folder)
    for index, sample in enumerate(counting(islice(numbered, limit), "reading data", total)):
        named = _named(sample, f"{where}: sample {index}")
        if index == 0:
            columns = {name: [] for name in named}
        if named.keys() != columns.keys():
            raise DataError(
                f"{where}: sample {index} has {', '.join(named) or 'nothing'}, the first has {', '.join(columns)}"
            )
        for name, value in named.items():
            tensor = to_tensor(value, f"{where}: sample {index}: {name}")
            first = columns[name][0] if columns[name] else tensor
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise DataError(
                    f"{where}: sample {index}: {name} is {_shown(tensor)}, the first sample's is {_shown(first)}; "
                    f"give all samples the same shape (pad or crop them)"
                )
            columns[name].append(tensor)
        count += 1
    if not count:
        raise DataError(f"{where}: gave no samples")
    return arrays_of({name: torch.stack(values) for name, values in columns.items()}, where, holdout)


def _all_inputs_and_all_targets(data: Any) -> bool:
    """Two that can't be samples, but may be a pair of lists, or a list of two arrays."""
    if not isinstance(data, list | tuple) or len(data) != 2:
        return False
    if all(isinstance(part, Tensor | np.ndarray) for part in data):
        return bool(data[0].shape != data[1].shape and data[0].shape[:1] == data[1].shape[:1])
    return all(isinstance(part, list | tuple) and len(part) > 2 for part in data) and len(data[0]) == len(data[1])


def _limited(arrays: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    return {str(key): value if limit is None else value[:limit] for key, value in arrays.items()}


def _samples(data: Any, where: str) -> Iterator[Any]:
    """One after the other. What the user's code raises, also when it is asked for its length, comes out where it is read."""
    if isinstance(data, Iterable) and not isinstance(data, str | bytes) and not _indexed(data):
        yield from data
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes):
        for index in range(len(data)):
            yield data[index]
    else:
        raise DataError(
            f"{where}: returned a {type(data).__name__}; return a torch Dataset, an iterable of samples, "
            f"or a dict of arrays with `inputs` and `targets`"
        )


def _indexed(data: Any) -> bool:
    """A map-style torch Dataset or a sequence: iterating one by the old protocol would hide an IndexError of the user's own."""
    if isinstance(data, torch.utils.data.Dataset):
        return not isinstance(data, torch.utils.data.IterableDataset)
    return isinstance(data, Sequence)


def _length(data: Any) -> int | None:
    """For showing progress; None where it is not known, or the user's code fails, which reading a sample will tell."""
    try:
        return len(data)
    except Exception:
        return None


def _guarded(samples: Iterator[Any], where: str, folder: Path | None) -> Iterator[Any]:
    """The same samples; an exception of the user's code becomes a `DataError` that names its line."""
    index = 0
    while True:
        try:
            sample = next(samples)
        except StopIteration:
            return
        except FusionError:
            raise
        except (Exception, SystemExit) as error:
            reason = explain(error, folder or Path.cwd())
            raise DataError(f"{where}: sample {index} can't be read: {reason}") from error
        yield sample
        index += 1


def _named(sample: Any, where: str) -> dict[str, Any]:
    if isinstance(sample, Mapping):
        return {str(key): value for key, value in sample.items()}
    if isinstance(sample, tuple | list):
        if len(sample) > 2:
            raise DataError(f"{where}: has {len(sample)} parts; return a pair (inputs, targets), or a dict by argument")
        return dict(zip(("inputs", "targets"), sample, strict=False))
    return {"inputs": sample}


def _shown(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{tuple(tensor.shape)}"
