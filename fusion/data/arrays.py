"""Arrays from `.npz` and `.npy` files, and from what a caller already holds in memory."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion.data.prepared import RawData, plain_tensor
from fusion.errors import DataError
from fusion.spec import ArraysData


def read_arrays(spec: ArraysData, base: Path) -> RawData:
    """Read an `.npz` file, or one `.npy` file per key. Raises `DataError`."""
    if isinstance(spec.arrays, str):
        path = base / spec.arrays
        where = f"data.arrays {path}"
        loaded = _load(path, where)
        if isinstance(loaded, np.ndarray):
            raise DataError(
                f"{where}: holds one array; give an .npz file with keys, or a mapping such as "
                f"{{inputs: {spec.arrays}, targets: labels.npy}}"
            )
        return arrays_of(loaded, where, spec.holdout)
    arrays: dict[str, Any] = {}
    for key, file in spec.arrays.items():
        where = f"data.arrays.{key} {base / file}"
        loaded = _load(base / file, where)
        if not isinstance(loaded, np.ndarray):
            raise DataError(f"{where}: holds several arrays ({', '.join(loaded)}); give an .npy file for each key")
        arrays[key] = loaded
    return arrays_of(arrays, "data.arrays", spec.holdout)


def arrays_of(arrays: Mapping[str, Any], where: str, holdout: float = 0.0) -> RawData:
    """Check arrays or tensors by key: plain dtypes, at least one axis, the same first axis. Raises `DataError`."""
    if not arrays:
        raise DataError(f"{where}: holds no arrays; give `inputs` and `targets`")
    tensors = {key: to_tensor(value, f"{where}: {key}") for key, value in arrays.items()}
    for key, tensor in tensors.items():
        if tensor.dim() == 0:
            raise DataError(f"{where}: {key} is a single number; its first axis should be the sample")
    lengths = {key: len(tensor) for key, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in tensors.items())
        raise DataError(f"{where}: the first axis is the sample and must be equal for all keys, but: {listed}")
    return RawData("arrays", tensors, where, holdout)


def to_tensor(value: Any, where: str) -> Tensor:
    """A tensor of a dtype that models are fed with. Raises `DataError`."""
    if isinstance(value, Tensor):
        return plain_tensor(value, where)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}: is not one array: {error}") from None
    except Exception as error:  # of the value's own __array__
        raise DataError(f"{where}: can't be made an array: {type(error).__name__}: {error}") from error
    if array.dtype.kind == "O":
        raise DataError(f"{where}: holds Python objects (rows of different length?); give a plain array of numbers")
    if array.dtype.kind not in "fiub" or array.dtype == np.longdouble:
        raise DataError(f"{where}: dtype {array.dtype} can't be fed to a model; give floats, integers or booleans")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return plain_tensor(torch.from_numpy(np.array(array)), where)


def _load(path: Path, where: str) -> np.ndarray[Any, Any] | dict[str, np.ndarray[Any, Any]]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return {key: loaded[key] for key in loaded.files}
    except FileNotFoundError:
        raise DataError(f"{where}: no such file") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, KeyError, MemoryError) as error:
        said = str(error).splitlines()[0] if str(error) else "damaged"
        # Numpy takes whatever is neither of its own files for a pickle; those begin with this byte.
        foreign = "allow_pickle" in said and "Object arrays" not in said and not _is_pickle(path)
        if foreign:
            reason = "not an .npz or .npy file; write one with numpy.savez"
        elif "allow_pickle" in said:
            reason = "it holds Python objects, which are not read (they could run code); save plain numeric arrays"
        else:
            reason = f"not a readable .npz or .npy file ({said})"
        raise DataError(f"{where}: {reason}") from None


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"
