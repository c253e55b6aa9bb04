"""Runs a worker in the foreground: threads set before torch is loaded, signals, exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from functools import partial

from fusion import garbage
from fusion.console import log_lines, say, settle
from fusion.errors import FusionError
from fusion.logs import log_as_json
from worker.config import WorkerConfig

__all__ = ["WorkerConfig", "run_worker"]

# A parent that died can't wait for a checkpoint: leave in good order if that goes fast, else at once.
_ORPHAN_PATIENCE = 3.0
# How often a thread may keep the interpreter to itself before another gets its turn: the default of 5 ms would be
# added to the latency of every message that arrives while Python code computes.
_SWITCH_SECONDS = 0.0005

log = logging.getLogger("fusion.worker")


def run_worker(config: WorkerConfig) -> int:
    """Join a pool and work until told to go; returns the process's exit code. Errors are one line on stderr.

    SIGINT and SIGTERM leave in good order; a second one leaves at once.
    """
    # Two processes whose threads spin for work on the same cores are many times slower than with waiting threads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))
    os.environ.setdefault("MKL_NUM_THREADS", str(config.threads))
    if config.json_logs:
        log_as_json()
    else:
        log_lines()
    # Until the event loop takes over there is nothing to put in order.
    signal.signal(signal.SIGTERM, lambda *_: _exit_now(0))
    try:
        return asyncio.run(_run(config))
    except FusionError as error:
        if config.json_logs:
            log.error("%s", error)
        else:
            say(f"error: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        settle()


async def _run(config: WorkerConfig) -> int:
    import torch

    from worker.machine.light_torch import leave_compiler_out, load_what_jobs_need

    leave_compiler_out()
    from worker.service import Service

    torch.set_num_threads(config.threads)
    sys.setswitchinterval(_SWITCH_SECONDS)
    tell = _log if config.json_logs else say
    service = Service(config, tell)
    loop = asyncio.get_running_loop()
    asked = False

    def on_signal(number: int) -> None:
        nonlocal asked
        if asked:
            tell("leaving at once")
            _exit_now(128 + number)
        asked = True
        service.leave(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    if config.exit_on_stdin_close:
        threading.Thread(target=_follow_stdin, args=(loop, service.leave), name="stdin", daemon=True).start()
    load_what_jobs_need()
    garbage.settle()
    return await service.run()


def _follow_stdin(loop: asyncio.AbstractEventLoop, leave: object) -> None:
    assert callable(leave)
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass  # No stdin counts as a closed one.
    try:
        # With it the coordinator has ended, too.
        loop.call_soon_threadsafe(partial(leave, "the process that started it has ended", patient=False))
    except RuntimeError:
        return  # The loop is closed: we are leaving already.
    threading.Event().wait(_ORPHAN_PATIENCE)
    _exit_now(0)


def _exit_now(code: int) -> None:
    """End without waiting for threads that compute."""
    settle()
    os._exit(code)


def _log(line: str) -> None:
    log.info("%s", line)
