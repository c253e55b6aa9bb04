"""The worker's life: joins, prepares and hosts what the coordinator asks for, and leaves in good order.

Runs in one event loop on the main thread; computing and moving tensors have threads of their own, so heartbeats go out
whatever they do. A coordinator that goes away does not stop the training.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket as sockets
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import Any

import aiohttp
import torch

from fusion import __version__
from fusion.addresses import bracketed
from fusion.messages import (
    Adopt,
    Backup,
    Check,
    Commit,
    Connect,
    Device,
    ExpectProbe,
    JoinRequest,
    Leaving,
    Prepare,
    ProbeLink,
    Reached,
    ServeRelay,
    Shutdown,
    Start,
    Stop,
    ToWorker,
    TryDirect,
    Unreached,
    UseRelay,
    Warned,
)
from fusion.sockets import new_keys
from fusion.wire import PROTOCOL_VERSION
from worker.config import WorkerConfig
from worker.control import Control
from worker.jobs.fetch import Fetcher
from worker.jobs.job_run import JobRun
from worker.joining import connector, join
from worker.machine.device import device_in_words, measure
from worker.machine.memory import MemoryGuard
from worker.pause import LEAVE_PATIENCE, Pause
from worker.transport.mover import Mover
from worker.transport.neighbours import Neighbours
from worker.transport.surroundings import surroundings
from worker.whereabouts import clock_in_words, find, in_words

# A coordinator that is started again is back by then.
_AWAY_PATIENCE = 20.0
# Our coordinator is connected to again within seconds of its return; one that answers HTTP and is not has forgotten us.
_FORGOTTEN_AFTER = 20.0
_NEEDED = "the machine is needed"

log = logging.getLogger("fusion.worker")


class Service:
    """One worker process. `run` returns its exit code; `leave` asks it to end."""

    def __init__(self, config: WorkerConfig, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._url = config.coordinator
        self._keys = new_keys()
        self._messages: asyncio.Queue[ToWorker] = asyncio.Queue()
        self._over = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._name = config.name or default_name()
        self._surroundings = surroundings(config.topology, self._name) if config.topology is not None else None
        self._mover = Mover(
            self._keys,
            self._warn,
            max_frame_bytes=config.max_frame_bytes,
            links=self._surroundings.links if self._surroundings is not None else None,
            unreached=lambda peer: self._report_from_thread(Unreached(peer=peer)),
            reached=lambda peer: self._report_from_thread(Reached(peer=peer)),
        )
        self._control = Control(self._keys, self._messages.put_nowait, self._connection_changed)
        self._run: JobRun | None = None
        self._neighbours = Neighbours(self._keys, self._mover, self._control.send, self._over.is_set)
        self._relay_port = 0
        self._why = ""
        self._leaving = ""
        """Why, once we are."""
        self._patient = True
        self._exit_code = 0
        self._pause = Pause(
            say=say,
            leave=self._control.send,
            go=self._rest_at_last,
            may_pause=lambda: self._control.connected and not self._leaving,
        )
        self._was_lost = False

    async def run(self) -> int:
        """Join and serve until told to go. Raises `FusionError` when the pool refuses us."""
        config = self._config
        device = await asyncio.to_thread(
            measure,
            config.device,
            config.threads,
            config.memory_limit,
            config.profile_seconds,
            config.speed,
            rests=config.topology is not None,
        )
        self._memory = MemoryGuard(device.memory_bytes, config.device)
        self._control.memory_used = self._memory.used
        self._control.refused = self._mover.refused.total
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector(config)) as session:
            self._session = session
            self._fetcher = Fetcher(session, self._url, config.bearer, max_blob_bytes=config.max_blob_bytes)
            try:
                await self._until_over(self._arrive(device))
                tasks = [
                    asyncio.create_task(self._serve()),
                    asyncio.create_task(self._mind_the_coordinator()),
                    asyncio.create_task(self._neighbours.report_arrivals()),
                    asyncio.create_task(self._control.ended()),
                ]
                if config.pause_when_busy:
                    tasks.append(asyncio.create_task(self._pause.mind_the_owner()))
                over = asyncio.create_task(self._over.wait())
                done, _ = await asyncio.wait([over, *tasks], return_when=asyncio.FIRST_COMPLETED)
                for task in (over, *tasks):
                    task.cancel()
                await asyncio.gather(over, *tasks, return_exceptions=True)
                for task in done:
                    task.result()
            finally:
                self._over.set()
                await self._neighbours.close()
                await self._drop_job("the worker leaves")
                await self._control.destroy()
                await asyncio.to_thread(self._mover.close)
        return self._exit_code

    def leave(self, reason: str, *, patient: bool = True) -> None:
        """Leave in good order: the coordinator may want to bring the job to its next checkpoint first.

        While it is away, a worker that is `patient` and has fragments waits for it for a moment.
        """
        if self._leaving:
            return
        self._leaving, self._patient = reason, patient
        if not self._control.connected:
            self._leave_unheard(f"leaving ({reason})")
            return
        self._say(f"leaving ({reason}){'; its fragments move first (again: leave at once)' if self._training else ''}")
        self._say_leaving()

    @property
    def _training(self) -> bool:
        return self._run is not None and self._run.training

    def _say_leaving(self) -> None:
        self._control.send(Leaving(reason=self._leaving))
        self._loop.call_later(LEAVE_PATIENCE, self._over.set)

    def _leave_unheard(self, words: str) -> None:
        """Nobody can take our fragments over in good order while the coordinator is away."""
        if not (self._training and self._patient):
            self._say(words)
            self._over.set()
            return
        self._say(
            f"{words}: waiting for the coordinator for {_AWAY_PATIENCE:g} s at most, so that its fragments move first (again: leave at once)"
        )
        self._loop.call_later(_AWAY_PATIENCE, self._leave_alone)

    def _leave_alone(self) -> None:
        if not self._control.connected and not self._over.is_set():
            self._say(
                "leaving without the coordinator; its fragments have not moved: others will replay what is lost with them"
            )
            self._exit_code = 1
            self._over.set()

    def _rest_at_last(self) -> None:
        """The coordinator has had its time to move our fragments, and the owner needs the machine."""
        if self._pause.on and self._control.connected:
            self._messages.put_nowait(Shutdown(reason=_NEEDED))

    async def _rest(self) -> None:
        """Out of the pool until the machine is quiet."""
        await self._drop_job(_NEEDED)
        await self._end_session()
        await self._pause.until_quiet()
        await self._join()
        self._pause.on = False

    # Joining ------------------------------------------------------------------------------------------------------

    async def _arrive(self, device: Device) -> None:
        endpoint = await self._listen()
        self._request = JoinRequest(
            name=self._name,
            protocol_version=PROTOCOL_VERSION,
            fusion_version=__version__,
            torch_version=str(torch.__version__),
            device=device,
            data_endpoint=endpoint,
            public_key=self._keys.public,
            probes=True,
            relay_port=self._relay_port,
        )
        await self._join()

    async def _listen(self) -> str:
        """Bind the data socket; returns the endpoint that peers use."""
        found = await find(self._config, self._say)
        self._why = found.why
        port = self._mover.start(found.bind, found.port)
        if self._config.relay:
            self._relay_port = self._neighbours.offer_relay(found.bind, self._config.relay_port, found.host)
        return f"tcp://{bracketed(found.host)}:{port}"

    async def _join(self) -> None:
        config = self._config
        joined = await join(self._session, self._url, config.bearer, self._request, self._say, config.coordinator_key)
        answer = joined.answer
        await self._neighbours.joined(answer)
        self._control.open(answer)
        self._say(f"worker {answer.worker} joined {self._url} ({device_in_words(self._request.device)})")
        self._say(in_words(self._request.data_endpoint, self._why, answer))
        skew = clock_in_words(answer, joined.asked_at, joined.answered_at)
        if skew is not None:
            self._say(skew)
            self._send_warning(skew)

    async def _until_over(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`, unless we are told to go first."""
        task = asyncio.create_task(work)
        over = asyncio.create_task(self._over.wait())
        await asyncio.wait([task, over], return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(over, return_exceptions=True)
        try:
            await task
        except asyncio.CancelledError:
            if not self._over.is_set():
                raise

    async def _join_again(self, why: str) -> None:
        self._say(f"joining anew: {why}")
        await self._drop_job(why)
        await self._end_session()
        await self._join()

    async def _end_session(self) -> None:
        """This incarnation is over: what it has to say, and what was said to it, is nothing to the next."""
        await self._control.close()
        self._control.forget()
        while not self._messages.empty():
            self._messages.get_nowait()

    async def _mind_the_coordinator(self) -> None:
        """Notice when the coordinator is up but does not know us any more (its state is gone): as if it had said so."""
        answering_since: float | None = None
        while True:
            await asyncio.sleep(2.0)
            if self._control.connected or self._control.lost_at is None:
                answering_since = None
                continue
            if not await self._answers():
                answering_since = None
                continue
            answering_since = answering_since or monotonic()
            if monotonic() - answering_since > _FORGOTTEN_AFTER:
                why = "the coordinator is back but has forgotten this worker"
                # Not here: a session ends in one place only, or two might begin.
                self._messages.put_nowait(Shutdown(reason=why, evicted=True))
                answering_since = None

    async def _answers(self) -> bool:
        try:
            async with self._session.get(f"{self._url}/healthz") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    def _connection_changed(self, connected: bool) -> None:
        if connected:
            if self._was_lost:
                self._say("the coordinator is back")
            self._was_lost = False
            if self._leaving:
                self._say_leaving()
            elif self._pause.on:
                self._pause.ask_to_leave()
        elif not self._over.is_set():
            self._was_lost = True
            lost = f"lost the coordinator at {self._url}"
            if self._leaving:
                self._leave_unheard(lost)
            else:
                self._say(f"{lost}; {'training goes on' if self._run else 'waiting for it'}")

    # Messages -----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        while True:
            message = await self._messages.get()
            match message:
                case Prepare() if self._run is not None and self._run.is_about(message):
                    pass  # Said again, in case that it was lost.
                case Prepare():
                    await self._drop_job("another plan comes")
                    self._run = self._new_run(message)
                case Start() | Backup() | Commit() | Adopt() | Check() | Connect():
                    if self._run is not None and self._run.job == message.job:
                        self._run.take(message)
                case ExpectProbe() | ProbeLink() | UseRelay() | TryDirect() | ServeRelay():
                    await self._neighbours.follow(message)
                case Stop():
                    if self._run is not None and self._run.job == message.job:
                        self._say(f"job {message.job}: {message.reason}")
                        await self._drop_job(message.reason)
                case Shutdown():
                    if self._leaving or not (message.evicted or self._pause.on):
                        self._say(f"leaving the pool: {message.reason}")
                        self._over.set()
                        return
                    if self._pause.on:
                        await self._rest()
                    else:
                        await self._join_again(message.reason)

    def _new_run(self, prepare: Prepare) -> JobRun:
        return JobRun(
            prepare,
            self._name,
            device=self._config.device,
            threads=self._config.threads,
            fetcher=self._fetcher,
            mover=self._mover,
            memory=self._memory,
            send=self._control.send,
            say=self._say,
            surroundings=self._surroundings,
        )

    async def _drop_job(self, why: str) -> None:
        run, self._run = self._run, None
        if run is not None:
            await run.drop(why)

    # Reports ------------------------------------------------------------------------------------------------------

    def _report_from_thread(self, message: Unreached | Reached) -> None:
        self._loop.call_soon_threadsafe(self._control.send, message)

    def _warn(self, line: str) -> None:
        self._loop.call_soon_threadsafe(self._send_warning, line)

    def _send_warning(self, line: str) -> None:
        self._control.send(Warned(job=self._run.job if self._run is not None else None, message=line))


def default_name() -> str:
    """The host's name and the process id, in the form that names have."""
    host = re.sub(r"[^A-Za-z0-9._-]+", "-", sockets.gethostname().split(".")[0]).strip("-._") or "worker"
    return f"{host[:48]}-{os.getpid()}"
