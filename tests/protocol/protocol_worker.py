"""A worker process: its control channel, and the life of one process from birth to death, stalls included."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol_run import JobRun
from pydantic import BaseModel

from fusion.messages import (
    Adopt,
    Backup,
    Commit,
    Connect,
    Heartbeat,
    Leaving,
    Prepare,
    Shutdown,
    Start,
    Stop,
)

if TYPE_CHECKING:
    from protocol_world import World

HEARTBEAT_SECONDS = 1.0
REPEAT_SECONDS = 20.0
"""Reports of so many seconds before a break are said again, as `worker.control` does."""


class Died(Exception):
    """The process was killed in the middle of what it did."""


class Process:
    """One process start of a worker: `key` is its own for good, `incarnation` changes each time that it joins."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.key = f"{name}/{world.number()}".ljust(40, "=")
        self.alive = True
        self.stalled = False
        self.incarnation: str | None = None
        self.run: JobRun | None = None
        self.gate: set[str] = set()
        """Keys of peers that may connect."""
        self.fuse: int | None = None
        """Dies before the so-and-so-manieth thing that it would let others know."""
        self.connected = False
        self._joining = False
        self._kept: deque[BaseModel] = deque()
        self._recent: deque[tuple[float, BaseModel]] = deque()
        self._frozen: list[Callable[[], None]] = []
        self._stalled_at = self._slept = 0.0
        self._lost_at = self._awake()
        self.leaving = False

    # Life and death ----------------------------------------------------------------------------------------------

    def later(self, delay: float, do: Callable[[], None]) -> None:
        self.world.clock.at(delay, lambda: self.happens(do))

    def happens(self, do: Callable[[], None]) -> None:
        """Something happens to this process: now, when it wakes, or never."""
        if not self.alive:
            return
        if self.stalled:
            self._frozen.append(do)
            return
        try:
            do()
        except Died:
            self.die()

    def burns(self) -> None:
        """Something is about to be let out; this may be where the process dies."""
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse <= 0:
                raise Died

    def die(self) -> None:
        if self.alive:
            self.world.log(f"{self.name} dies")
            self.end()

    def end(self) -> None:
        self.alive = False
        self.run = None
        self.world.process_ended(self)

    def stall(self) -> None:
        if not self.stalled:
            self.stalled, self._stalled_at = True, self.world.clock.now

    def wake(self) -> None:
        if self.stalled:
            self.stalled = False
            self._slept += max(0.0, self.world.clock.now - self._stalled_at - 2 * HEARTBEAT_SECONDS)
            frozen, self._frozen = self._frozen, []
            for do in frozen:
                self.happens(do)

    # Joining -----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """Ask to be taken in until that is granted."""
        world = self.world
        if self.incarnation is not None or self._joining:
            return
        self._joining = True
        self.later(0.01 + 0.1 * world.dice.random(), self._ask)

    def _ask(self) -> None:
        world, coordinator = self.world, self.world.coordinator
        if coordinator is not None and not world.network.apart(self.name, "coordinator"):
            self.incarnation = coordinator.join(self.name, self.key)
        if self.incarnation is None:
            self.later(0.5, self._ask)
            return
        self._joining = False
        self._connect_again()
        self._beat(self.incarnation)

    def _join_again(self) -> None:
        self.drop_job()
        self.incarnation = None
        self._kept.clear()
        self._recent.clear()
        self.connected = False
        self.join()

    def _beat(self, incarnation: str) -> None:
        if self.incarnation == incarnation:
            self._send(Heartbeat(incarnation=incarnation), lasting=False)
            self.later(HEARTBEAT_SECONDS, lambda: self._beat(incarnation))

    def leave(self) -> None:
        """SIGTERM."""
        if self.leaving:
            return
        self.leaving = True
        if self.connected:
            self._send(Leaving(reason="SIGTERM"), lasting=False)
            self.later(90.0, self.end)
        else:
            self.end()

    # The control channel -----------------------------------------------------------------------------------------

    def _awake(self) -> float:
        """Seconds in which this process was not stopped, as `worker.control` counts them."""
        return self.world.clock.now - self._slept

    def send(self, message: BaseModel) -> None:
        self.burns()
        self._send(message, lasting=True)

    def _send(self, message: BaseModel, *, lasting: bool) -> None:
        if not self.connected:
            if lasting:
                self._kept.append(message)
            return
        if lasting:
            self._recent.append((self._awake(), message))
            while self._recent[0][0] < self._awake() - REPEAT_SECONDS:
                self._recent.popleft()
        self.world.hear(self, message)

    def disconnected(self) -> None:
        """The connection to the coordinator is seen to be broken."""
        if self.connected:
            self.connected = False
            self._lost_at = self._awake()
            if self.leaving:
                self.end()
                return
            self._connect_again()

    def _connect_again(self) -> None:
        if self.connected or self.incarnation is None:
            return
        self._connect()
        self.later(0.1 + 0.5 * self.world.dice.random(), self._connect_again)

    def _connect(self) -> None:
        if self.world.coordinator is None or self.world.network.apart(self.name, "coordinator"):
            return
        assert self.incarnation is not None
        self.connected = True
        self._send(Heartbeat(incarnation=self.incarnation), lasting=False)
        again = [message for at, message in self._recent if at >= self._lost_at - REPEAT_SECONDS]
        kept = list(self._kept)
        self._recent.clear()
        self._kept.clear()
        for message in (*again, *kept):
            self._send(message, lasting=True)

    def told(self, message: BaseModel) -> None:
        """A message of the coordinator for this incarnation."""
        match message:
            case Prepare() if self.run is not None and self.run.is_about(message):
                pass
            case Prepare():
                self.drop_job()
                self.run = JobRun(self, message)
                self.run.make_ready()
            case Start() | Backup() | Commit() | Adopt() | Connect():
                if self.run is not None and self.run.job == message.job:
                    self.run.take(message)
            case Stop():
                if self.run is not None and self.run.job == message.job:
                    self.drop_job()
            case Shutdown(evicted=True):
                self.world.log(f"{self.name} was evicted")
                self._join_again()
            case Shutdown():
                self.end()

    def drop_job(self) -> None:
        run, self.run = self.run, None
        if run is not None:
            run.close()
