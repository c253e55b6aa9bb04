"""The real coordinator daemon as a child process that can be killed, and how long its messages waited until they were counted.

Messages carry the time at which they were handed over as "memory used"; the histograms outlive the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "coordinator"))

from coordinator_cases import equal_ops

from benchmarks.histogram import Histogram
from coordinator.config import CoordinatorConfig
from coordinator.daemon import run_coordinator
from coordinator.engine import Engine
from fusion.errors import FusionError
from fusion.messages import Heartbeat, ToCoordinator


def stamp() -> int:
    """Microseconds of the machine's monotonic clock."""
    return time.monotonic_ns() // 1000


def serve(state: Path, port: int, core: int) -> int:
    """The real daemon; what is added notes when a message was counted that was sent at a known time."""
    if core >= 0:
        os.sched_setaffinity(0, {core})
    heartbeats, reports = Histogram(state.parent / "heartbeats"), Histogram(state.parent / "reports")
    take_in = Engine.on_message

    def timed(engine: Engine, incarnation: str, message: ToCoordinator) -> None:
        take_in(engine, incarnation, message)
        sent = getattr(message, "memory_used_bytes", 0)
        if sent:
            (heartbeats if isinstance(message, Heartbeat) else reports).add((stamp() - sent) / 1e6)

    config = CoordinatorConfig(state=state, port=port, json_ready=True, exit_on_stdin_close=True)
    with patch.object(Engine, "on_message", timed):
        return run_coordinator(config, equal_ops)


@dataclass
class Daemon:
    """The coordinator as a child process."""

    process: asyncio.subprocess.Process
    url: str
    said: dict[str, Any]

    @classmethod
    async def start(cls, state: Path, port: int, core: int) -> Daemon:
        """Port 0: any free one; core -1: any."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, str(state), str(port), str(core)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        line = await process.stdout.readline()
        if not line:
            raise FusionError("the coordinator did not start")
        said = json.loads(line)
        return cls(process, said["url"], said)

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def stop(self) -> None:
        if self.process.returncode is None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            await self.process.wait()


if __name__ == "__main__":
    sys.exit(serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
