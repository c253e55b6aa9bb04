"""Runs the coordinator in the foreground: opens the state folder, binds both ports, says how to join, waits for the end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web

from coordinator.config import CoordinatorConfig
from coordinator.control import Control
from coordinator.engine import Engine
from coordinator.entry import access as access_module
from coordinator.entry.announcement import Announcement, goes_to_the_journal, warnings
from coordinator.entry.tls import load_tls
from coordinator.http.api import make_app
from coordinator.plans.planning import Planner
from coordinator.storage.blobs import BlobStore
from coordinator.storage.checkpoints import Checkpoints
from coordinator.storage.copies import Copies
from coordinator.storage.store import Store
from fusion import credentials, garbage
from fusion.console import log_lines, say, settle
from fusion.errors import FusionError, ServiceError
from fusion.logs import log_as_json
from fusion.relay.child import RelayProcess
from fusion.relay.port import listen

logger = logging.getLogger(__name__)


def run_coordinator(config: CoordinatorConfig, planner: Planner | None = None) -> int:
    """Run until SIGINT, SIGTERM or (when asked) the end of standard input; returns the process's exit code."""
    if config.json_logs:
        log_as_json()
    else:
        log_lines()
    try:
        return asyncio.run(_serve(config, planner))
    except FusionError as error:
        return _failed(config, str(error))
    except sqlite3.DatabaseError as error:
        return _failed(config, f"can't read the store in {config.state}: {error}")
    except KeyboardInterrupt:
        return 0
    finally:
        settle()


def _failed(config: CoordinatorConfig, why: str) -> int:
    if config.json_logs:
        logger.error("%s", why)
    else:
        say(f"error: {why}", sys.stderr)
    return 1


async def _serve(config: CoordinatorConfig, planner: Planner | None) -> int:
    tls = load_tls(config.tls_cert, config.tls_key)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    with open_state(config.state):
        access = access_module.load(config.state, config.token, config.join_token)
        engine = make_engine(config, planner)
        control = Control(access.keys, engine.on_message, engine.on_closed)
        listener = bind_http(config.host, config.port)
        try:
            engine.admit_known(control)
            _bind_control(config, control)
            if config.relay:
                engine.offer_relay(_bind_relay(config))
            app = make_app(engine, access, not config.no_dashboard, tls)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
            await runner.setup()
            engine.start(control)
            garbage.settle()
            await web.SockSite(runner, listener, ssl_context=tls.context if tls is not None else None).start()
            announce(config, Announcement(config, access, tls, listener.getsockname()[1], control.port))
            if config.exit_on_stdin_close:
                threading.Thread(target=_follow_stdin, args=(loop, stop), name="stdin", daemon=True).start()
            await _first(stop, engine.failing)
            engine.publisher.close()
            await runner.cleanup()
            await engine.close()
        finally:
            listener.close()
    return 0


async def _first(*events: asyncio.Event) -> None:
    """Wait for any of them."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()


def make_engine(config: CoordinatorConfig, planner: Planner | None = None) -> Engine:
    """The engine over the files of `config.state`. Raises `ServiceError`."""
    store = Store(config.state / "coordinator.sqlite3")
    blobs = BlobStore(config.state / "blobs", config.max_blob_bytes)
    checkpoints = Checkpoints(config.state / "checkpoints", blobs)
    if planner is None:
        from coordinator.plans.scheduling import scheduler_planner

        planner = scheduler_planner(config.topology, relative_speeds=config.relative_speeds)
    copies = Copies(config.checkpoints_to, checkpoints) if config.checkpoints_to is not None else None
    return Engine(config, store, blobs, checkpoints, planner, copies=copies)


@contextlib.contextmanager
def open_state(state: Path) -> Iterator[None]:
    """Make the folder, and hold it for this process alone. Raises `ServiceError`."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        state.chmod(0o700)
        handle = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ServiceError(f"can't use {state} as state folder: {error.strerror}; choose another --state") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ServiceError(
                f"another coordinator uses {state}; stop it, or give this one another --state folder"
            ) from None
        yield
    finally:
        os.close(handle)


def bind_http(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ServiceError` in one line when the port is taken."""
    host = "0.0.0.0" if host in ("", "*") else host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            message = f"port {port} on {host} is in use; take another --port, or stop the program there"
        else:
            message = f"can't listen on {host}:{port}: {getattr(error, 'strerror', None) or error}"
        raise ServiceError(message) from None
    listener.setblocking(False)
    return listener


def _bind_control(config: CoordinatorConfig, control: Control) -> None:
    """Bind the control channel: to the port of the last start if possible, so that workers find us again."""
    remembered = config.state / "control.port"
    port = config.control_port
    if not port:
        with contextlib.suppress(FileNotFoundError, ValueError):
            port = int(remembered.read_text())
    control.bind(config.host, port)
    access_module.write_private(remembered, f"{control.port}\n")


def _bind_relay(config: CoordinatorConfig) -> RelayProcess:
    """Bind the relay to the port of the last start if possible, so that firewalls need not change. Starts nothing yet."""
    remembered, port = config.state / "relay.port", config.relay_port
    if not port:
        with contextlib.suppress(FileNotFoundError, ValueError):
            port = int(remembered.read_text())
    try:
        listener = listen(config.host, port)
    except FusionError:
        if config.relay_port:
            raise
        listener = listen(config.host, 0)
    relay = RelayProcess(listener)
    access_module.write_private(remembered, f"{relay.port}\n")
    return relay


def announce(config: CoordinatorConfig, said: Announcement) -> None:
    """Say where we are and how to join, and leave the credentials for the same user."""
    ca = str(said.tls.certificate) if said.tls is not None else None
    token = said.access.operator_token
    access_module.write_private(
        config.state / "client.json", json.dumps({"url": said.url, "token": token, "ca": ca}) + "\n"
    )
    for line in warnings(config, said.tls):
        if config.json_logs:
            logger.warning("%s", line)
        else:
            say(f"warning: {line}", sys.stderr)
    if config.json_ready:
        say(said.for_programs())
        return
    written = credentials.write(said.url, token, ca)
    if config.json_logs:
        logger.info(
            "Fusion coordinator at %s", said.url, extra={"fields": {"url": said.url, "state": str(config.state)}}
        )
        return
    for line in said.for_people(written, secrets=not goes_to_the_journal()):
        say(line)


def _follow_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Stop when our parent closes our standard input, or dies. A thread, because not every stdin can be polled."""
    with contextlib.suppress(OSError):  # No stdin counts as a closed one.
        while os.read(0, 4096):
            pass
    with contextlib.suppress(RuntimeError):  # The loop is closed: we are stopping already.
        loop.call_soon_threadsafe(stop.set)
