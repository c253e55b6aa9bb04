"""Lines of daemons: whatever becomes of their reader, printing them stops nothing and changes no exit code."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.console import LineHandler, say

_DAEMON = """
import logging, os, sys
from fusion.console import log_lines, say, settle
log_lines()
print("left in the buffer")
for _ in range(300):
    say("a line of a hundred characters " + 69 * ".")
    say("one for stderr", sys.stderr)
    logging.getLogger("x").warning("a warning")
settle()
os.write(int(sys.argv[1]), b"came to its end")
sys.exit(7)
"""


def _run(out: int, err: int) -> tuple[int, bytes]:
    """A process with these descriptors as stdout and stderr; returns its exit code and what it says at its end."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as end:
        process = subprocess.Popen(
            [sys.executable, "-c", _DAEMON, str(writer)],
            stdout=out,
            stderr=err,
            pass_fds=(writer,),
            env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
        )
        os.close(writer)
        try:
            return process.wait(30), end.read()
        finally:
            process.kill()


def test_a_reader_that_has_gone_is_not_missed() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert _run(writer, writer) == (7, b"came to its end")
    finally:
        os.close(writer)


def test_a_reader_that_reads_no_more_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    try:
        assert _run(writer, writer) == (7, b"came to its end")
        assert os.read(reader, 15) == b"left in the buf"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_leaves_stderr_as_it_is(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        with (tmp_path / "err").open("wb") as err:
            assert _run(full, err.fileno()) == (7, b"came to its end")
    finally:
        os.close(full)
    lines = (tmp_path / "err").read_text().splitlines()
    assert lines == ["one for stderr", "a warning"] * 300


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        say("zürich: 3 °C", out)
    assert (tmp_path / "out").read_text() == "z\\xfcrich: 3 \\xb0C\n"


def test_a_closed_stream_takes_nothing(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        pass
    say("to nobody", out)
    LineHandler(out).handle(logging.makeLogRecord({"msg": "to nobody"}))
