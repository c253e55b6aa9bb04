"""TensorBoard's event file: known checksums, the header that every such file has, and values that read back."""

from __future__ import annotations

import struct
from contextlib import closing

import pytest

from fusion.client import StreamItem
from fusion.errors import UserError
from fusion.tensorboard import TensorBoardFile, crc32c


def records(data: bytes) -> list[bytes]:
    """The events of a file, their checksums checked."""
    found = []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        for part, stored in ((data[:8], data[8:12]), (data[12 : 12 + length], data[12 + length : 16 + length])):
            crc = crc32c(part)
            rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
            assert struct.unpack("<I", stored)[0] == (rotated + 0xA282EAD8) % 2**32
        found.append(data[12 : 12 + length])
        data = data[16 + length :]
    return found


def fields(message: bytes) -> list[tuple[int, int | float | bytes]]:
    """(number, value) of a protocol-buffer message."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (message[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 0x80:
                return value, at

    found: list[tuple[int, int | float | bytes]] = []
    at = 0
    while at < len(message):
        key, at = varint(at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = varint(at)
            found.append((number, value))
        elif kind == 2:
            size, at = varint(at)
            found.append((number, message[at : at + size]))
            at += size
        else:
            form, size = {1: ("<d", 8), 5: ("<f", 4)}[kind]
            found.append((number, struct.unpack_from(form, message, at)[0]))
            at += size
    return found


@pytest.mark.parametrize(
    ("data", "crc"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_the_checksum_is_that_of_rfc_3720(data, crc):
    assert crc32c(data) == crc


def test_a_run_reads_back(tmp_path):
    with closing(TensorBoardFile(tmp_path / "board", clock=lambda: 1700000000.5)) as file:
        file.write(StreamItem("job", {"state": "running"}))
        metric = {"step": 300, "loss": 1.5, "step_seconds": 0.5, "sent_bytes": 1000, "tokens": 64, "eval_loss": None}
        file.write(StreamItem("metrics", metric))
        file.write(StreamItem("metrics", {"step": 301, "loss": 1e300, "step_seconds": 0.0, "tokens": 64}))
    (path,) = (tmp_path / "board").iterdir()
    assert path.name.startswith("events.out.tfevents.1700000000.")
    data = path.read_bytes()
    # What every event file begins with: 24 bytes of event, their checksum, and field 1 of it.
    assert data[:13] == bytes.fromhex("1800000000000000a37f4b2209")
    version, first, second = map(fields, records(data))
    assert version == [(1, 1700000000.5), (3, b"brain.Event:2")]
    assert first[:2] == [(1, 1700000000.5), (2, 300)]
    values = {tag: value for _, raw in fields(first[2][1]) for (_, tag), (_, value) in [fields(raw)]}
    assert values == {
        b"loss/train": 1.5,
        b"step/seconds": 0.5,
        b"step/sent_bytes": 1000.0,
        b"step/tokens_per_second": 128.0,
    }
    assert [value for _, raw in fields(second[2][1]) for _, value in [fields(raw)[1]]] == [float("inf"), 0.0]


def test_no_folder_writes_nothing_and_a_bad_one_is_one_line(tmp_path):
    with closing(TensorBoardFile(None)) as file:
        file.write(StreamItem("metrics", {"step": 1}))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--tensorboard .*: can't be written"):
        TensorBoardFile(tmp_path / "file" / "board")


def test_a_full_disk_is_what_an_event_file_tells(tmp_path):
    """Closing it tries again to write what is left, and must not hide that."""
    board = TensorBoardFile(tmp_path)
    board.close()
    board._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(UserError, match=r"can't be written: No space left on device"), closing(board):
        board.write(StreamItem("metrics", {"step": 1, "loss": 1.0}))
