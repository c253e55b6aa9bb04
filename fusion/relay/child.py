"""A relay in a process of its own, so that its copying takes no time from whoever offers it: started when first needed.

The parent binds the port, so a port that is taken is told at once; the child gets the socket, and the tickets through its
standard input. It ends with its parent; when it dies it is started again.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent.parent
_LOOK_SECONDS = 1.0
_END_SECONDS = 2.0

log = logging.getLogger(__name__)


class RelayProcess:
    """Keeps the child that serves `listener` (and closes it at the end). `allow` and `close` never wait for the child."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._news = threading.Condition()
        self._tickets: dict[str, str] | None = None
        self._told = True
        self._closing = False
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="relay", daemon=True)

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def pid(self) -> int | None:
        """The child's process id, once there is one."""
        return self._child.pid if self._child is not None else None

    def allow(self, tickets: Mapping[str, str]) -> None:
        """Only these tickets (hexadecimal, with their secrets) count from now on."""
        with self._news:
            self._tickets, self._told = dict(tickets), False
            if not self._thread.is_alive() and not self._closing and tickets:
                self._thread.start()
            self._news.notify()

    def close(self) -> None:
        """End the child."""
        with self._news:
            self._closing = True
            self._news.notify()
        if self._thread.is_alive():
            self._thread.join(2 * _END_SECONDS)
        self._listener.close()

    def _keep(self) -> None:
        try:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._closing or not self._told, _LOOK_SECONDS)
                    if self._closing:
                        return
                    anew = self._child is None or self._child.poll() is not None
                    if self._told and not anew:
                        continue
                    tickets, self._told = self._tickets, True
                if anew:
                    self._end()
                    try:
                        self._child = self._start()
                    except OSError as error:
                        log.warning("can't start the relay: %s; it is tried again", error)
                        continue
                self._tell({"tickets": tickets})
        finally:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        number = self._listener.fileno()
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # -P keeps the working folder off the path. No token of ours is any of its business.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("FUSION_")}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "fusion.relay", str(number)],
            stdin=subprocess.PIPE,
            pass_fds=(number,),
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            # Ctrl-C at the terminal is for its parent, who ends it.
            start_new_session=True,
        )

    def _tell(self, order: object) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        with suppress(OSError):  # It has died: the next look starts another.
            self._child.stdin.write(json.dumps(order).encode() + b"\n")
            self._child.stdin.flush()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.stdin is not None:
            with suppress(OSError):
                child.stdin.close()
        try:
            child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
