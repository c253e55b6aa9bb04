"""Blobs of the coordinator over HTTP: whole ones checked by their hash, safetensors read by ranges, nothing unneeded.

Only the header and the tensors asked for cross the network. The header is checked before memory is taken: its length, every
shape, dtype and offset, that tensors do not overlap and that the blob is as long as they say.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp
import torch
from torch import Tensor

from fusion.errors import BlobError, CoordinatorError, UnreachableError
from fusion.messages import BlobRef
from fusion.units import format_bytes
from worker.jobs.state_blob import StateBlob

MAX_HEADER_BYTES = 64 * 2**20
MAX_RANK = 16
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
# Unneeded bytes between two wanted tensors that are cheaper to read than a further request.
_GAP_BYTES = 128 * 1024
_RANGE_BYTES = 64 * 2**20

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies in a safetensors blob; `begin` and `end` count from the start of the blob."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_entries(header: bytes, blob_size: int) -> dict[str, TensorEntry]:
    """The tensors that a safetensors header (without its length prefix) describes. Raises `BlobError`."""
    try:
        fields = json.loads(header, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise BlobError(f"the tensor file's header is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BlobError("the tensor file's header is not a JSON object")
    base = 8 + len(header)
    entries = {name: _entry(name, value, base, blob_size) for name, value in fields.items() if name != "__metadata__"}
    position = base
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < position:
            raise BlobError(f"tensor {entry.name!r} overlaps the one before it")
        position = entry.end
    return entries


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _entry(name: str, value: object, base: int, blob_size: int) -> TensorEntry:
    if not isinstance(value, dict):
        raise BlobError(f"tensor {name!r} is not described by an object")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value.get("dtype"), str) else None
    if dtype is None:
        raise BlobError(f"tensor {name!r} has dtype {value.get('dtype')!r}; known: {', '.join(_DTYPES)}")
    shape, offsets = value.get("shape"), value.get("data_offsets")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(_natural(size) for size in shape):
        raise BlobError(f"tensor {name!r} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_natural(offset) for offset in offsets):
        raise BlobError(f"tensor {name!r} has no valid offsets")
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    begin, end = base + offsets[0], base + offsets[1]
    if end - begin != nbytes:
        raise BlobError(f"tensor {name!r} of shape {shape} needs {nbytes} bytes, its offsets hold {end - begin}")
    if end > blob_size:
        raise BlobError(f"tensor {name!r} ends at byte {end}, the blob has only {blob_size}")
    return TensorEntry(name, dtype, tuple(shape), begin, end)


def coalesce(entries: Iterable[TensorEntry]) -> list[tuple[int, int, list[TensorEntry]]]:
    """Ranges `(begin, end, tensors)` to request: neighbours together, as long as a range stays of moderate size."""
    ranges: list[tuple[int, int, list[TensorEntry]]] = []
    for entry in sorted(entries, key=lambda entry: entry.begin):
        if ranges:
            begin, end, members = ranges[-1]
            if entry.begin - end <= _GAP_BYTES and entry.end - begin <= _RANGE_BYTES:
                ranges[-1] = (begin, max(end, entry.end), [*members, entry])
                continue
        ranges.append((entry.begin, entry.end, [entry]))
    return ranges


class _Read:
    """Bytes `begin .. end` of a blob, of which the first `filled` have come."""

    def __init__(self, ref: BlobRef, begin: int, end: int) -> None:
        self.ref = ref
        self.begin = begin
        self.end = end
        self.filled = 0
        self.buffer = torch.empty(end - begin, dtype=torch.uint8)


class TensorFile:
    """A safetensors blob at the coordinator, its header read and checked."""

    def __init__(self, fetcher: Fetcher, ref: BlobRef, entries: dict[str, TensorEntry]) -> None:
        self._fetcher = fetcher
        self._ref = ref
        self.entries = entries

    async def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, each in memory of its own. Raises `BlobError` for a name the blob does not have."""
        wanted = list(dict.fromkeys(names))
        missing = [name for name in wanted if name not in self.entries]
        if missing:
            raise BlobError(f"blob {self._ref.digest[:12]} has no tensor {missing[0]!r} ({len(missing)} missing)")
        found: dict[str, Tensor] = {}
        for begin, end, members in coalesce(self.entries[name] for name in wanted):
            data = await self._fetcher.read_range(self._ref, begin, end)
            for entry in members:
                piece = data[entry.begin - begin : entry.end - begin]
                found[entry.name] = piece.clone().view(entry.dtype).view(entry.shape)
        return {name: found[name] for name in wanted}


class Fetcher:
    """Reads and writes blobs at one coordinator; counts the bytes it read.

    Raises `BlobError` (refused), `CoordinatorError` (an error answer) or `UnreachableError` (after several attempts).
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        token: str | None,
        *,
        max_blob_bytes: int = 2**38,
        attempts: int = 6,
    ) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._max_blob_bytes = max_blob_bytes
        self._attempts = attempts
        self.fetched_bytes = 0

    async def whole(self, ref: BlobRef, limit: int) -> bytes:
        """A small blob, checked by its hash."""
        if ref.size > limit:
            raise BlobError(f"blob {ref.digest[:12]} of {format_bytes(ref.size)} is over {format_bytes(limit)}")
        data = (await self.read_range(ref, 0, ref.size)).numpy().tobytes()
        if hashlib.sha256(data).hexdigest() != ref.digest:
            raise BlobError(f"blob {ref.digest[:12]} does not match its hash; it was damaged on the way")
        return data

    async def open(self, ref: BlobRef) -> TensorFile:
        """Read the header of a safetensors blob."""
        if ref.size > self._max_blob_bytes:
            raise BlobError(f"blob {ref.digest[:12]} of {format_bytes(ref.size)} is over the limit of this worker")
        if ref.size < 8:
            raise BlobError(f"blob {ref.digest[:12]} is no tensor file: it has {ref.size} bytes")
        (length,) = struct.unpack("<Q", (await self.read_range(ref, 0, 8)).numpy().tobytes())
        if length > min(MAX_HEADER_BYTES, ref.size - 8):
            raise BlobError(f"blob {ref.digest[:12]} is no tensor file: its header would have {length} bytes")
        header = (await self.read_range(ref, 8, 8 + length)).numpy().tobytes()
        return TensorFile(self, ref, read_entries(header, ref.size))

    async def read_range(self, ref: BlobRef, begin: int, end: int) -> Tensor:
        """Bytes `begin .. end` of a blob as a uint8 tensor; after a connection that broke, only the rest is asked for."""
        read = _Read(ref, begin, end)
        if begin < end:
            await self._retrying(lambda: self._read_on(read), lambda: read.filled)
        return read.buffer

    async def upload(self, blob: StateBlob) -> BlobRef:
        """Put a blob; free when the coordinator has it already."""
        ref = await asyncio.to_thread(blob.ref)
        await self._retrying(lambda: self._put(ref, blob))
        return ref

    async def _read_on(self, read: _Read) -> None:
        ref, begin = read.ref, read.begin + read.filled
        if begin == read.end:
            return
        headers = {**self._headers, "Range": f"bytes={begin}-{read.end - 1}"}
        view = read.buffer.numpy()
        async with self._session.get(f"{self._url}/api/v1/blobs/{ref.digest}", headers=headers) as answer:
            if answer.status not in (200, 206):
                raise CoordinatorError(await _problem(answer, f"blob {ref.digest[:12]}"), answer.status)
            if answer.status == 200 and (begin, read.end) != (0, ref.size):
                raise BlobError(f"blob {ref.digest[:12]}: the coordinator sent all of it instead of a range")
            async for chunk in answer.content.iter_chunked(2**20):
                if read.filled + len(chunk) > len(view):
                    raise BlobError(f"blob {ref.digest[:12]}: more bytes came than were asked for")
                view[read.filled : read.filled + len(chunk)] = memoryview(chunk)
                read.filled += len(chunk)
                self.fetched_bytes += len(chunk)
        if read.filled < len(view):
            raise BlobError(f"blob {ref.digest[:12]} is cut: {read.filled} of {len(view)} bytes came")

    async def _put(self, ref: BlobRef, blob: StateBlob) -> None:
        url = f"{self._url}/api/v1/blobs/{ref.digest}"
        headers = {**self._headers, "Content-Length": str(ref.size)}

        async def body() -> AsyncIterator[bytes | memoryview]:
            for piece in blob.pieces():
                yield piece

        async with self._session.put(url, headers=headers, data=body()) as answer:
            if answer.status >= 300:
                raise CoordinatorError(await _problem(answer, "upload"), answer.status)

    async def _retrying(
        self, request: Callable[[], Awaitable[Answer]], progress: Callable[[], int] = lambda: 0
    ) -> Answer:
        """What `request` gives at last. An attempt that has made `progress` was not in vain: it counts as the first again."""
        attempt, delay, before = 1, 0.2, progress()
        while True:
            try:
                return await request()
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                if progress() > before:
                    attempt, delay, before = 1, 0.2, progress()
                if attempt == self._attempts:
                    raise UnreachableError(
                        f"the coordinator at {self._url} does not answer: {_reason(error)}"
                    ) from None
            await asyncio.sleep(delay)
            attempt, delay = attempt + 1, min(delay * 2, 5.0)


def _reason(error: Exception) -> str:
    """In the system's words where it has some: those of aiohttp speak of its own settings."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__


async def _problem(answer: aiohttp.ClientResponse, what: str) -> str:
    try:
        reason = (await answer.json(content_type=None))["error"]
    except (ValueError, KeyError, TypeError):
        reason = answer.reason
    return f"{what}: {reason} ({answer.status})"
