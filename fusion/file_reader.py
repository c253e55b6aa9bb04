"""A file, or bytes, as the body of an upload: in pieces so small that one leaves in time on any link that is of use."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

_CHUNK = 1 << 16


class FileReader:
    """A file that reports how much of it was read, and that can start again."""

    def __init__(self, file: BinaryIO, progress: Callable[[int], None] | None) -> None:
        self._file = file
        self._progress = progress

    def read(self, size: int = -1) -> bytes:
        chunk = self._file.read(_CHUNK if size < 0 else max(size, _CHUNK))
        if self._progress is not None:
            self._progress(len(chunk))
        return chunk

    def rewind(self) -> None:
        if self._progress is not None:
            self._progress(-self._file.tell())
        self._file.seek(0)
