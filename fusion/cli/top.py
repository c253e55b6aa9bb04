"""`fusion top`."""

from __future__ import annotations

import time
from queue import Empty, Queue
from threading import Thread
from typing import TYPE_CHECKING, Annotated

import typer

from fusion.cli.connection import connect
from fusion.cli.options import CaOption, CoordinatorOption, TokenOption
from fusion.errors import CoordinatorError, ServiceError, UnreachableError

if TYPE_CHECKING:
    from fusion.client import Client, StreamItem
    from fusion.pool_view import PoolView

_REDRAW_SECONDS = 0.5
_LONGEST_PAUSE = 5.0


def top(
    once: Annotated[
        bool,
        typer.Option("--once", envvar="FUSION_ONCE", help="Print the present state and end; also without a terminal."),
    ] = False,
    coordinator: CoordinatorOption = None,
    token: TokenOption = None,
    ca: CaOption = None,
) -> None:
    """Watch a pool in the terminal. Workers, jobs, rates and what happens; Ctrl-C ends it."""
    from rich.console import Console

    from fusion.cli.output import show
    from fusion.pool_view import PoolView

    console = Console()
    with connect(coordinator, token, ca) as client:
        view = PoolView(client.url)
        _fill(client, view)
        if once or not console.is_terminal:
            show(view.draw(time.time()))
            return
        try:
            _watch(client, view, console)
        except KeyboardInterrupt:
            return


def _fill(client: Client, view: PoolView) -> None:
    """The present state and the recent past, before the stream tells the rest."""
    from fusion.client import StreamItem

    for worker in client.workers():
        view.take(StreamItem("worker", worker))
    for job in client.jobs():
        view.take(StreamItem("job", job))
        if job["state"] == "running":
            for metric in client.metrics(job["id"], max(0, job["step"] - 200)):
                view.take(StreamItem("metrics", {"job": job["id"], **metric}))


def _watch(client: Client, view: PoolView, console: object) -> None:
    from rich.console import Console
    from rich.live import Live

    assert isinstance(console, Console)
    items: Queue[StreamItem | ServiceError | None] = Queue()
    Thread(target=_read, args=(client, items), name="stream", daemon=True).start()
    with Live(view.draw(time.time()), console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic()
        while True:
            try:
                item = items.get(timeout=max(0.01, due - time.monotonic()))
            except Empty:
                due = time.monotonic() + _REDRAW_SECONDS
                live.update(view.draw(time.time()), refresh=True)
                continue
            if item is None:
                view.start_anew()
            elif isinstance(item, CoordinatorError):
                raise item
            elif isinstance(item, ServiceError):
                view.problem = f"{item}; trying again"
            else:
                view.take(item)


def _read(client: Client, items: Queue[StreamItem | ServiceError | None]) -> None:
    """Pass the stream on; None says that a new one begins. Ends when the coordinator refuses."""
    pause = 0.5
    while True:
        try:
            for number, item in enumerate(client.stream()):
                if number == 0:
                    items.put(None)
                    pause = 0.5
                items.put(item)
        except UnreachableError as error:
            items.put(error)
        except CoordinatorError as error:
            items.put(error)
            return
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
