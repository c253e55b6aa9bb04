"""A worker's part in spot checks, for its compute thread: it bears witness, shows what it sent, and runs others' steps again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel
from torch import Tensor

from fusion.errors import FusionError
from fusion.messages import Check, CheckVoid
from fusion.wire import FrameKind, Header
from worker.jobs.assembly import Assembly
from worker.jobs.explain import explain
from worker.jobs.fingerprint import fingerprint
from worker.jobs.rerun import Examine, Rerun, asking
from worker.protocol.session import Session
from worker.protocol.witness import CHECKED, SHOWN, Witness
from worker.transport.arrival import Arrival
from worker.transport.parcel import Parcel

_TURN = 4
"""A rerun waits for nothing to do, but for no more than so many tasks of the training."""

log = logging.getLogger("fusion.worker")

Transmit = Callable[[str, Header, Parcel | None], None]


@dataclass(frozen=True, slots=True)
class Testify:
    """A check is ordered; `state` is the digest of the fragment's snapshot after the last step, when it is held here."""

    order: Check
    state: str = ""


class SpotChecks:
    """Of one job. `transmit` sends to a peer, `report` tells the coordinator."""

    def __init__(
        self,
        assembly: Assembly,
        session: Session[Parcel],
        transmit: Transmit,
        report: Callable[[BaseModel], None],
    ) -> None:
        self._assembly = assembly
        self._session = session
        self._transmit = transmit
        self._report = report
        self._witness: Witness[Parcel] = Witness(session.dispatch, session.log)
        self._reruns: list[Rerun] = []
        self._waited = 0

    @staticmethod
    def digest(header: Header, value: Tensor | None) -> str:
        """What is noted of a message; to be called where it comes in, because hashing takes a while."""
        return fingerprint(value) if header.kind in SHOWN or header.kind in CHECKED else ""

    def arrived(self, header: Header, sender: str, value: Arrival, digest: str) -> bool:
        """Whether this message was for a check, and no more is to be done about it."""
        if header.kind is FrameKind.SHOW:
            sent = self._witness.show(header, sender)
            if sent is not None:
                self._transmit(sender, sent.again(self._session.epoch), sent.parcel)
            return True
        if header.kind not in CHECKED:
            return False
        key = (CHECKED[header.kind], header.edge, header.step, header.micro_batch)
        for rerun in tuple(self._reruns):
            try:
                rerun.shown(key, sender, value, digest)
            except Exception as error:
                self._reruns.remove(rerun)
                self._give_up(rerun.order, error)
        return True

    def took(self, header: Header, digest: str) -> None:
        """A message of the training was taken."""
        self._witness.took(header, digest)

    def testify(self, asked: Testify) -> None:
        """Say what we had got, and show what we sent from now on."""
        if asked.order.epoch == self._session.epoch:
            hosted = asked.order.fragment in self._session.hosted
            self._report(self._witness.asked(asked.order, hosted, asked.state))

    def examine(self, asked: Examine) -> None:
        """Run a fragment again."""
        order = asked.order
        if order.epoch != self._session.epoch:
            return
        partition, train = self._assembly.partition, self._assembly.prepare.train

        def ask(kind: FrameKind, edge: int, step: int, micro_batch: int) -> None:
            key = (kind, edge, step, micro_batch)
            host = self._session.plan.placement[self._session.dispatch.source(kind, edge)]
            self._transmit(host, asking(order, self._session.epoch, key), None)

        try:
            self._reruns.append(Rerun(asked, self._session.plan, partition, train, ask))
        except Exception as error:
            self._give_up(order, error)

    def advance(self, busy: bool) -> bool:
        """Run one task of a rerun, if it is its turn; `busy` when the training has a task too."""
        self._waited = self._waited + 1 if busy else _TURN
        if self._waited < _TURN:
            return False
        for rerun in tuple(self._reruns):
            try:
                advanced = rerun.advance()
                if rerun.finished:
                    self._reruns.remove(rerun)
                    self._report(rerun.result())
            except Exception as error:
                self._reruns.remove(rerun)
                self._give_up(rerun.order, error)
                advanced = True
            if advanced:
                self._waited = 0
                return True
        return False

    def ask_again(self) -> None:
        """Nothing has come for long."""
        for rerun in self._reruns:
            rerun.ask_again()

    def forget(self, through: int) -> None:
        """`through` is the common snapshot: what came before can't be checked any more."""
        self._witness.forget(through)
        self._reruns = [rerun for rerun in self._reruns if rerun.order.through > through]

    def switched(self) -> None:
        """There is another placement: checks under the one before are over."""
        self._witness.drop()
        self._reruns.clear()

    def _give_up(self, order: Check, error: Exception) -> None:
        if not isinstance(error, FusionError):
            log.warning("a spot check of fragment %d failed", order.fragment, exc_info=error)
        self._report(
            CheckVoid(
                job=order.job,
                epoch=order.epoch,
                fragment=order.fragment,
                through=order.through,
                message=explain(error),
            )
        )
