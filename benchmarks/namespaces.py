"""Networks of namespaces: one for each worker, made as a whole and removed as a whole. Needs root and `ip`."""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

COORDINATOR = 1
"""The last part of the coordinator's address; those of the workers follow it."""
_FOLDER = Path("/run/netns")
_CLONE_NEWNET = 0x40000000


class NamespaceNetwork(ABC):
    """A namespace for each worker; use as a context manager, leaving it removes everything."""

    def __init__(self, workers: Sequence[str], subnet: str) -> None:
        # Interface names have 15 characters at most, and other networks of this kind may be there.
        self._tag = f"fz{secrets.token_hex(2)}"
        self._prefix = f"{subnet}.{secrets.randbelow(256)}"
        self._undo = ExitStack()
        self.namespaces = {worker: f"{self._tag}-{number}" for number, worker in enumerate(workers)}
        self.host = self._address(COORDINATOR)
        """Where the coordinator listens."""

    def _address(self, host: int) -> str:
        return f"{self._prefix}.{host}"

    @abstractmethod
    def _build(self, undo: ExitStack) -> None:
        """Set up what joins the namespaces, which are there; what takes it down goes to `undo`."""

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            for namespace in self.namespaces.values():
                undo.callback(run_if_possible, "ip", "netns", "del", namespace)
                run("ip", "netns", "add", namespace)
            self._build(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def run_if_possible(*command: str) -> None:
    """For taking down what may not be there."""
    with suppress(subprocess.CalledProcessError):
        run(*command)


def enter(namespace: str) -> None:
    """Move this thread, and whatever it starts, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(_FOLDER / namespace, os.O_RDONLY)
    try:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), namespace)
    finally:
        os.close(descriptor)
