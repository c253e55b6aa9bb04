"""A fragment's state as a safetensors blob that is never whole in memory: a header, then the tensors' own bytes."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate

from torch import Tensor

from compress.buffers import bytes_of
from fusion.messages import BlobRef

_PIECE = 2**20
_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}


class StateBlob:
    """Tensors, which must stay as they are, as the bytes that `safetensors.torch.save` would give up to their order."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        # Wide dtypes first keeps every tensor aligned to its element size, as the safetensors library does it.
        named = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        header: dict[str, object] = {}
        offset = 0
        for name, tensor in named:
            header[name] = {
                "dtype": _NAMES[str(tensor.dtype).removeprefix("torch.")],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._head = struct.pack("<Q", len(encoded)) + encoded
        self._tensors = [tensor for _, tensor in named]
        self._size = len(self._head) + offset
        self._begins = [*accumulate((tensor.nbytes for tensor in self._tensors), initial=len(self._head))]

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The blob from start to end in pieces of moderate size; may be called again."""
        yield self._head
        for tensor in self._tensors:
            data = bytes_of(tensor)
            for begin in range(0, len(data), _PIECE):
                yield data[begin : begin + _PIECE]

    def read(self, begin: int, end: int) -> bytes | memoryview:
        """Bytes `begin` to `end` of the blob, less what lies beyond its end; no copy of what lies in one tensor."""
        parts: list[bytes | memoryview] = [self._head[begin:end]] if begin < len(self._head) else []
        for index in range(max(0, bisect_right(self._begins, begin) - 1), len(self._tensors)):
            first = self._begins[index]
            if first >= end:
                break
            parts.append(bytes_of(self._tensors[index])[max(0, begin - first) : end - first])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @property
    def size(self) -> int:
        """Bytes."""
        return self._size

    def checksum(self) -> int:
        """CRC-32; reads all of it, several times as fast as `ref` does."""
        value = 0
        for piece in self.pieces():
            value = zlib.crc32(piece, value)
        return value

    def ref(self) -> BlobRef:
        """Its name and size; reads all of it."""
        hasher = hashlib.sha256()
        for piece in self.pieces():
            hasher.update(piece)
        return BlobRef(digest=hasher.hexdigest(), size=self._size)
