"""Takes secrets off this process's command line, which every user of the machine can read (`ps`).

Linux keeps the line in the process's own memory, where it may be overwritten; elsewhere, and for the moment that Python takes
to start, only the environment (`FUSION_TOKEN`, `FUSION_JOIN`) hides a secret.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path

_IN_URL = re.compile(r"[?&]token=([^&#'\"\s]+)")
_FLAGS = ("--token", "--join-token")
# Fields 48 and 49 of /proc/PID/stat, counted from the one after the name in brackets: begin and end of the line.
_BEGIN, _END = 45, 46


def secrets_of(arguments: Sequence[str]) -> list[str]:
    """Tokens among command-line arguments: the values of `--token` and `--join-token`, and those in join URLs."""
    found = [secret for argument in arguments for secret in _IN_URL.findall(argument)]
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        flag, given, value = argument.partition("=")
        if flag in _FLAGS:
            found.append(value if given else following)
    return [secret for secret in found if secret]


def hide_secrets(arguments: Sequence[str]) -> None:
    """Overwrite the tokens among `arguments` in what `ps` shows of this process; does nothing where that can't be done."""
    secrets = secrets_of(arguments)
    if not secrets:
        return
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        begin, end = int(fields[_BEGIN]), int(fields[_END])
        line = Path("/proc/self/cmdline").read_bytes()
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(begin)
            if memory.read(end - begin) != line:
                return  # Not where we thought: touch nothing.
            for secret in secrets:
                raw = secret.encode("utf-8", "surrogateescape")
                line = line.replace(raw, b"x" * len(raw))
            memory.seek(begin)
            memory.write(line)
