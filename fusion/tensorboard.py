"""TensorBoard's event file: protocol-buffer events in TFRecord frames, written by hand so that nothing has to be installed.

::

    frame    length (8 bytes) · masked CRC of the length · event · masked CRC of the event
    event    1: wall time (double) · 2: step (varint) · 3: file version (text) | 5: summary
    summary  1: value, repeated, each 1: tag (text) · 2: simple value (float)
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from fusion.client import StreamItem
from fusion.errors import UserError

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected.
_MASK = 0xA282EAD8
_TAGS = {
    "loss": "loss/train",
    "eval_loss": "loss/held_out",
    "gradient_norm": "gradient_norm",
    "step_seconds": "step/seconds",
    "sent_bytes": "step/sent_bytes",
    "epoch": "step/plan_epoch",
}


def _table() -> tuple[int, ...]:
    rows = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        rows.append(value)
    return tuple(rows)


_CRC = _table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _CRC[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def frame(event: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(event))
    return length + _masked(length) + event + _masked(event)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + _MASK) & 0xFFFFFFFF)


def version_event(wall_time: float) -> bytes:
    """What every file begins with."""
    return _double(1, wall_time) + _bytes(3, b"brain.Event:2")


def scalars_event(wall_time: float, step: int, values: dict[str, float]) -> bytes:
    """The values of one step by tag."""
    summary = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in values.items())
    return _double(1, wall_time) + _varint_field(2, step) + _bytes(5, summary)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _double(number: int, value: float) -> bytes:
    return _varint(number << 3 | 1) + struct.pack("<d", value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _float(number: int, value: float) -> bytes:
    try:
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    except OverflowError:
        return _float(number, float("inf") if value > 0 else float("-inf"))


class TensorBoardFile:
    """Writes the metrics of a followed job into a fresh event file in `folder`; `None` writes nothing.

    Raises `UserError` when the file can't be written. Close it at the end.
    """

    def __init__(self, folder: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._folder = folder
        self._file: BinaryIO | None = None
        if folder is None:
            return
        name = f"events.out.tfevents.{int(clock()):010d}.{socket.gethostname()}.{os.getpid()}.fusion"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(folder / name, "xb")  # noqa: SIM115  (closed in `close`)
        except OSError as error:
            raise self._unwritable(error) from None
        self._write(version_event(clock()))

    def write(self, item: StreamItem) -> None:
        """Write a step's metrics; other items are not for this file."""
        if self._file is None or item.kind != "metrics":
            return
        metric = item.data
        values = {tag: float(metric[key]) for key, tag in _TAGS.items() if metric.get(key) is not None}
        for unit in ("tokens", "samples"):
            if metric.get(unit) and metric.get("step_seconds"):
                values[f"step/{unit}_per_second"] = metric[unit] / metric["step_seconds"]
        self._write(scalars_event(self._clock(), int(metric["step"]), values))

    def _write(self, event: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(frame(event))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"--tensorboard {self._folder}: can't be written: {error.strerror or error}")

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written has been told, and is still in the buffer
                self._file.close()
