"""A file as the body of an upload."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

_CHUNK = 1 << 20


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
