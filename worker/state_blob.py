"""A fragment's state as a safetensors blob that is never whole in memory: a header, then the tensors' own bytes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping

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

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The blob from start to end in pieces of moderate size; may be called again."""
        yield self._head
        for tensor in self._tensors:
            data = bytes_of(tensor)
            for begin in range(0, len(data), _PIECE):
                yield data[begin : begin + _PIECE]

    def ref(self) -> BlobRef:
        """Its name and size; reads all of it."""
        hasher = hashlib.sha256()
        for piece in self.pieces():
            hasher.update(piece)
        return BlobRef(digest=hasher.hexdigest(), size=self._size)
