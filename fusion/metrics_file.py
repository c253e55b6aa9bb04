"""The metrics file: JSON lines, one per step, and events as lines with `event` (design section 9)."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from fusion.client import StreamItem
from fusion.errors import UserError


class MetricsFile:
    """Writes what `fusion.follow.follow` yields; each line is on disk's way as soon as it is known.

    Raises `UserError` when the file can't be opened or written. Close it at the end.
    """

    def __init__(self, path: Path | str | None) -> None:
        """`None` writes nothing, so that callers need no branch."""
        self._path = path
        self._file: TextIO | None = None
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  (closed in `close`)
            except OSError as error:
                raise UserError(f"--metrics {path}: can't be written: {error.strerror or error}") from None

    def write(self, item: StreamItem) -> None:
        """Write a metric or an event; other items are not for this file."""
        if self._file is None or item.kind not in ("metrics", "event"):
            return
        line = {key: value for key, value in item.data.items() if value is not None or key == "loss"}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"--metrics {self._path}: can't be written: {error.strerror or error}") from None

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written has been told, and is still in the buffer
                self._file.close()
