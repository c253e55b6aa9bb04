"""A worker that can be told to fail at an exact point: `python -m benchmarks.faulty_worker worker --join URL ...`.

It is the ordinary worker. The file that FAULT_FOLDER and its name lead to (`FOLDER/NAME`) is looked at before each
point; when it names the point, it is removed and the process kills itself there, as `kill -9` would. Points: `forward`,
`backward`, `update` (computed, not yet passed on), `report` (updated, not yet reported), `snapshot` (some pieces are sent),
`replay` (the first task of an adopted fragment), `pause`; and `cut`, which breaks its connections instead.

While another process has `FOLDER/.hold` locked, no worker begins a task; everything else goes on.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusion.cli import main
from worker.jobs import backups, host
from worker.protocol.instructions import SayPaused

HOLD = ".hold"
POINTS = ("forward", "backward", "update", "report", "snapshot", "replay", "pause", "cut")


def due(point: str) -> bool:
    """Whether this worker is to fail here; says so once."""
    try:
        if FILE.read_text(encoding="utf-8") != point:
            return False
        FILE.unlink()
    except OSError:
        return False
    return True


def fail_at(point: str) -> None:
    if due(point):
        os.kill(os.getpid(), signal.SIGKILL)


def wait_while_held() -> None:
    with HELD.open(encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_SH)


def after(owner: Any, name: str, point: str) -> None:
    """Fail when the method has done its work and nobody has heard of it."""
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        fail_at(point)
        return result

    setattr(owner, name, wrapped)


def before(owner: Any, name: str, point: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        fail_at(point)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def install() -> None:
    from executor.program import FragmentProgram

    after(FragmentProgram, "forward", "forward")
    after(FragmentProgram, "backward", "backward")
    after(FragmentProgram, "update", "update")
    before(host.JobHost, "_report_step", "report")
    after(backups.Backups, "_send_piece", "snapshot")
    execute, message = host.JobHost._execute, host.JobHost._message

    def execute_or_fail(self: host.JobHost, task: Any) -> None:
        if task.fragment in self._session._replaying:
            fail_at("replay")
        if due("cut"):
            assert self._route is not None
            for peer in self._route.connections.values():
                peer.connect_again()
        wait_while_held()  # Outside the task: a worker is not taken for a slow one.
        execute(self, task)

    def message_or_fail(self: host.JobHost, instruction: Any) -> Any:
        if isinstance(instruction, SayPaused):
            fail_at("pause")
        return message(self, instruction)

    host.JobHost._execute = execute_or_fail  # type: ignore[method-assign]
    host.JobHost._message = message_or_fail  # type: ignore[method-assign]


if __name__ == "__main__":
    FOLDER = Path(os.environ["FAULT_FOLDER"])
    FILE, HELD = FOLDER / sys.argv[sys.argv.index("--name") + 1], FOLDER / HOLD
    install()
    main()
