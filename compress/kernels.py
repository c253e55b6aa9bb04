"""The encoders' inner loops in C (`kernels.c`), where the install could build them; None where it could not.

They give the bits of the passes in `blocks.py` and `topk.py`, several times as fast: `tests/compress/test_kernels.py`. An install
without a C compiler goes without them, and nothing else is different.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

MOST_BLOCK = 1024
"""The largest block that they take."""


class Kernels:
    """The loaded library. Arrays have to be contiguous and of the named dtypes; what is written has to have the room."""

    def __init__(self, path: str) -> None:
        """Raises `OSError` when this machine can't load it."""
        library = ctypes.CDLL(path)
        pointer = ctypes.c_void_p
        self._encode_blocks = library.fusion_encode_blocks
        self._encode_blocks.restype = None
        self._encode_blocks.argtypes = [
            pointer,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int32,
            pointer,
            pointer,
            pointer,
        ]
        self._at_least: dict[int, Callable[..., int]] = {}
        for bytes_each, threshold in ((4, ctypes.c_int32), (2, ctypes.c_int16)):
            found = getattr(library, f"fusion_at_least_{8 * bytes_each}")
            found.restype = ctypes.c_int64
            found.argtypes = [pointer, ctypes.c_int64, threshold, pointer]
            self._at_least[bytes_each] = found
        self._write_varints = library.fusion_write_varints
        self._write_varints.restype = ctypes.c_int64
        self._write_varints.argtypes = [pointer, ctypes.c_int64, ctypes.c_int64, pointer]

    def encode_blocks(
        self,
        values: NDArray[np.float32],
        block: int,
        bits: int,
        noise: NDArray[np.int16] | None,
        scales: NDArray[np.int16],
        out: NDArray[np.uint8],
    ) -> None:
        """As `blocks.encode` for blocks of at most `MOST_BLOCK`; `noise`, `scales` and `out` are of whole blocks."""
        self._encode_blocks(
            values.ctypes.data,
            len(values),
            block,
            bits,
            None if noise is None else noise.ctypes.data,
            scales.ctypes.data,
            out.ctypes.data,
        )

    def at_least(self, bits: NDArray[np.int32] | NDArray[np.int16], threshold: int) -> NDArray[np.int64]:
        """Positions of the floats, given as their bits, whose bits without the sign are at least `threshold` (over 0)."""
        # Only what is written becomes memory.
        out = np.empty(len(bits), dtype=np.int64)
        count = self._at_least[bits.itemsize](bits.ctypes.data, len(bits), threshold, out.ctypes.data)
        return out[:count]

    def write_varints(self, positions: NDArray[np.int64], most: int) -> NDArray[np.uint8] | None:
        """The gaps of `compress.indices` as bytes; None when there would be more than `most`."""
        out = np.empty(most, dtype=np.uint8)
        size = self._write_varints(positions.ctypes.data, len(positions), most, out.ctypes.data)
        return None if size < 0 else out[:size]


def _load() -> Kernels | None:
    # Built as if it were an extension module, so that installers know where it goes; it is not imported as one.
    found = importlib.util.find_spec("compress._kernels")
    if found is None or found.origin is None or sys.byteorder != "little":
        return None
    try:
        return Kernels(found.origin)
    except (OSError, AttributeError):
        return None


KERNELS: Kernels | None = _load()
