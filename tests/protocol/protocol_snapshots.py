"""Snapshots on their way and held, under the rules of `worker.jobs.backups`: announced, asked for, sent, verified, kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from protocol_values import Value
from pydantic import BaseModel

from fusion.messages import BackupFailed, Holding
from fusion.wire import FrameKind, Header

POKE_SECONDS = 1.0
ROOM = 10
"""Bytes of a snapshot, of an announcement too."""


@dataclass
class _Held:
    source: str
    state: int
    here: bool = False


class Snapshots:
    """Those of one worker in one job."""

    def __init__(
        self,
        job: str,
        transmit: Callable[[str, Header, Value | None], None],
        report: Callable[[BaseModel], None],
        epoch: Callable[[], int],
        room: Callable[[int], bool],
        damaged: Callable[[], bool],
    ) -> None:
        self._job = job
        self._transmit = transmit
        self._report = report
        self._epoch = epoch
        self._room = room
        self._damaged = damaged
        self._offers: dict[int, tuple[int, str, int]] = {}
        self._held: dict[tuple[int, int], _Held] = {}
        self._common = -1

    def offer(self, fragment: int, step: int, to: str, state: int) -> None:
        if step > self._common:
            self._offers[fragment] = (step, to, state)
            self._announce(fragment)

    def keep(self, fragment: int, step: int) -> None:
        at, _, state = self._offers.get(fragment, (-1, "", 0))
        if at == step:
            self._held[fragment, step] = _Held("", state, here=True)

    def state(self, fragment: int, step: int) -> int | None:
        held = self._held.get((fragment, step))
        return held.state if held is not None and held.here else None

    def sent(self, fragment: int, step: int) -> bool:
        """Whether we hold a snapshot of our own fragment, which would be kept if the fragment moved away."""
        return self._offers.get(fragment, (-1,))[0] == step

    def commit(self, step: int) -> bool:
        new = step > self._common
        self._common = max(self._common, step)
        self._held = {key: held for key, held in self._held.items() if key[1] >= step}
        self._offers = {fragment: offer for fragment, offer in self._offers.items() if offer[0] > step}
        return new

    def poke(self) -> None:
        for (fragment, step), held in self._held.items():
            if not held.here:
                self._want(fragment, step, held.source)
        for fragment in self._offers:
            self._announce(fragment)

    def handle(self, header: Header, sender: str, value: Value | None) -> None:
        key = fragment, step = header.edge, header.step
        if header.kind is FrameKind.SNAPSHOT_WANT:
            offer = self._offers.get(fragment)
            if offer is not None and offer[:2] == (step, sender):
                self._transmit(sender, self._header(fragment, step, 1), Value(offer[2], ROOM))
        elif header.micro_batch == 0:
            assert value is not None
            self._announced(fragment, step, sender, value)
        else:
            assert value is not None
            held = self._held.get(key)
            if held is None or held.here:
                return
            if self._damaged():
                del self._held[key]
                self._fail(fragment, step, "corrupt")
                return
            assert value.value == held.state, f"another snapshot of fragment {fragment} after step {step}"
            held.here = True
            self._hold(fragment, step)

    def _announced(self, fragment: int, step: int, sender: str, value: Value) -> None:
        known = self._held.get((fragment, step))
        if known is not None and (known.state, known.source) == (value.value, sender):
            if known.here:
                self._hold(fragment, step)
            return
        if step <= self._common:
            return
        if not self._room(fragment):
            self._fail(fragment, step, "memory")
            return
        kept = (value.common, self._common)
        for stale in [at for at in self._held if at[0] == fragment and at[1] < step and at[1] not in kept]:
            del self._held[stale]
        self._held[fragment, step] = _Held(sender, value.value)
        self._want(fragment, step, sender)

    def _announce(self, fragment: int) -> None:
        step, to, state = self._offers[fragment]
        self._transmit(to, self._header(fragment, step, 0), Value(state, ROOM, self._common))

    def _want(self, fragment: int, step: int, source: str) -> None:
        self._transmit(source, Header(self._job, self._epoch(), FrameKind.SNAPSHOT_WANT, fragment, step, 1), None)

    def _header(self, fragment: int, step: int, number: int) -> Header:
        kind = FrameKind.SNAPSHOT
        return Header(self._job, self._epoch(), kind, fragment, step, number, "none", "uint8", (ROOM,))

    def _hold(self, fragment: int, step: int) -> None:
        self._report(Holding(job=self._job, epoch=self._epoch(), step=step, fragment=fragment, bytes=ROOM))

    def _fail(self, fragment: int, step: int, cause: Literal["corrupt", "memory"]) -> None:
        self._report(BackupFailed(job=self._job, epoch=self._epoch(), step=step, fragment=fragment, cause=cause))
