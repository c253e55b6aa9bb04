"""The safetensors format by hand, so that any dtype passes through without torch: u64 header length, JSON, raw bytes.

Files are written by copying ranges of other files in pieces; no tensor is ever whole in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from fusion.errors import BlobError

MAX_HEADER_BYTES = 100 * 2**20
_PIECE = 4 * 2**20
# safetensors' dtype names <-> torch's, with bytes per element.
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file: `length` bytes from absolute offset `start` of `path`."""

    path: Path
    dtype: str
    """safetensors' name, e.g. `BF16`."""
    shape: tuple[int, ...]
    start: int
    length: int

    @property
    def torch_dtype(self) -> str:
        return DTYPES[self.dtype][0]


def read_header(path: Path, what: str = "blob") -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. Raises `BlobError` with what is wrong with it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise BlobError(f"{what}: too short for safetensors ({size} bytes)")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise BlobError(f"{what}: safetensors header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise BlobError(f"{what}: safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise BlobError(f"{what}: safetensors header is not a map")
    header.pop("__metadata__", None)
    return {name: _entry(path, what, name, entry, 8 + length, size) for name, entry in header.items()}


def _entry(path: Path, what: str, name: str, entry: Any, base: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, end)
    except (TypeError, KeyError, ValueError):
        raise BlobError(f"{what}: tensor {name!r} lacks dtype, shape or data_offsets") from None
    if any(type(number) is not int or number < 0 for number in numbers):
        raise BlobError(f"{what}: tensor {name!r} has sizes that are not natural numbers")
    if dtype not in DTYPES:
        raise BlobError(f"{what}: tensor {name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if len(shape) > 64 or end < start or base + end > size or end - start != prod(shape) * DTYPES[dtype][1]:
        raise BlobError(f"{what}: tensor {name!r} of shape {list(shape)} does not fit bytes {start}..{end} of {size}")
    return StoredTensor(path, dtype, shape, base + start, end - start)


@dataclass(frozen=True, slots=True)
class Written:
    digest: str
    size: int


def write(target: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]) -> Written:
    """Write a safetensors file from tensors of other files; flushed to disk, its hash computed on the way.

    Raises `OSError` (a full disk, say); the caller removes what was written.
    """
    # Wide dtypes first keeps every tensor aligned to its element size, as the safetensors library does it.
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype][1], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.length],
        }
        offset += tensor.length
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    hasher = hashlib.sha256()
    with target.open("wb") as out:
        prefix = struct.pack("<Q", len(encoded)) + encoded
        hasher.update(prefix)
        out.write(prefix)
        _copy([tensors[name] for name in order], out, hasher)
        out.flush()
        os.fsync(out.fileno())
    return Written(hasher.hexdigest(), 8 + len(encoded) + offset)


def _copy(tensors: Sequence[StoredTensor], out: BinaryIO, hasher: Any) -> None:
    source: BinaryIO | None = None
    opened: Path | None = None
    try:
        for tensor in tensors:
            if opened != tensor.path or source is None:
                if source is not None:
                    source.close()
                source, opened = tensor.path.open("rb"), tensor.path
            source.seek(tensor.start)
            left = tensor.length
            while left:
                piece = source.read(min(left, _PIECE))
                if not piece:
                    raise BlobError(f"{tensor.path.name} ended {left} bytes early")
                hasher.update(piece)
                out.write(piece)
                left -= len(piece)
    finally:
        if source is not None:
            source.close()
