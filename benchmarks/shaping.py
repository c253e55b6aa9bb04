"""Gives every worker a network of its own behind a link of a given rate: namespaces, veth pairs and token buckets.

Needs root, `ip` and `tc`. The workers' links meet in a bridge; the coordinator stands at the bridge itself, so its own
link is not shaped. Both directions of each link have the rate; delay is not added, the queue is 100 ms long.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

FOLDER = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_BURST = 32 * 1024
_QUEUE_SECONDS = 0.1


def unavailable() -> str | None:
    """Why this machine can't shape links, in words; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if lacking:
        return f"{' and '.join(lacking)} not found; install iproute2"
    with suppress(subprocess.CalledProcessError), ShapedNetwork(["probe"], 100e6):
        return None
    return "this kernel lacks network namespaces, veth, bridges or token buckets"


class ShapedNetwork:
    """A namespace for each worker; use as a context manager, leaving it removes everything."""

    def __init__(self, workers: Sequence[str], bits_per_second: float) -> None:
        self._rate = int(bits_per_second)
        # Interface names have 15 characters at most, and other networks of this kind may be there.
        self._tag = f"fz{secrets.token_hex(2)}"
        self._third = secrets.randbelow(256)
        self.host = f"10.77.{self._third}.1"
        """The bridge: where the coordinator listens."""
        self.namespaces = {worker: f"{self._tag}-{number}" for number, worker in enumerate(workers)}

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        with suppress(subprocess.CalledProcessError):
            _run("ip", "link", "del", self._tag)
        for namespace in self.namespaces.values():
            with suppress(subprocess.CalledProcessError):  # its end of the pair goes with it
                _run("ip", "netns", "del", namespace)

    def cut(self, worker: str) -> None:
        """Let nothing through to or from this worker any more; connections are not closed."""
        self._plug(worker, "down")

    def heal(self, worker: str) -> None:
        """Take `cut` back."""
        self._plug(worker, "up")

    def _plug(self, worker: str, state: str) -> None:
        _run("ip", "link", "set", f"{self._tag}v{list(self.namespaces).index(worker)}", state)

    def _build(self) -> None:
        _run("ip", "link", "add", self._tag, "type", "bridge")
        _run("ip", "addr", "add", f"{self.host}/24", "dev", self._tag)
        _run("ip", "link", "set", self._tag, "up")
        queue = max(4 * _BURST, int(self._rate / 8 * _QUEUE_SECONDS))
        bucket = ("root", "tbf", "rate", str(self._rate), "burst", str(_BURST), "limit", str(queue))
        for number, namespace in enumerate(self.namespaces.values()):
            outer = f"{self._tag}v{number}"
            inside = ("ip", "-n", namespace)
            _run("ip", "netns", "add", namespace)
            _run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _run("ip", "link", "set", outer, "master", self._tag, "up")
            _run(*inside, "addr", "add", f"10.77.{self._third}.{number + 2}/24", "dev", "eth0")
            _run(*inside, "link", "set", "lo", "up")
            _run(*inside, "link", "set", "eth0", "up")
            _run("tc", "qdisc", "add", "dev", outer, *bucket)
            _run("tc", "-n", namespace, "qdisc", "add", "dev", "eth0", *bucket)


def enter(namespace: str) -> None:
    """Move this thread, and whatever it starts, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(FOLDER / namespace, os.O_RDONLY)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    finally:
        os.close(descriptor)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
