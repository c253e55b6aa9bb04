"""What a worker can say about others in a spot check: digests of what it got of them, and what it sent itself. Sans I/O.

Digests are noted when a value comes in, long before anybody knows whether it will be checked, and kept as long as the replay
log keeps what was sent: until the next common snapshot.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Generic, TypeVar

from fusion.messages import Check, Digest, Receipts
from fusion.wire import FrameKind, Header
from worker.protocol.dispatch import Dispatch
from worker.protocol.replay_log import Key, Parcel, ReplayLog, Sent

P = TypeVar("P", bound=Parcel)

SHOWN = {
    FrameKind.ACTIVATION: FrameKind.SHOWN_ACTIVATION,
    FrameKind.GRADIENT: FrameKind.SHOWN_GRADIENT,
    FrameKind.NORMS: FrameKind.SHOWN_NORMS,
}
"""The kinds of messages that are checked, and as what they are shown to whoever checks."""
CHECKED = {shown: kind for kind, shown in SHOWN.items()}


def named(key: Key, digest: str) -> Digest:
    kind, index, step, micro_batch = key
    return kind.name, index, step, micro_batch, digest  # type: ignore[return-value]


class Witness(Generic[P]):
    """The receipts of one worker; `dispatch` and `log` are those of its session."""

    def __init__(self, dispatch: Dispatch, log: ReplayLog[P]) -> None:
        self._dispatch = dispatch
        self._log = log
        self._receipts: dict[Key, str] = {}
        self._orders: dict[int, Check] = {}

    def took(self, header: Header, digest: str) -> None:
        """A value has come in, for the first time."""
        if header.kind in SHOWN:
            self._receipts[header.key] = digest

    def forget(self, through: int) -> None:
        """Steps up to `through` won't be checked any more."""
        self._receipts = {key: digest for key, digest in self._receipts.items() if key[2] > through}
        self._orders = {fragment: order for fragment, order in self._orders.items() if order.through > through}

    def drop(self) -> None:
        """There is another placement: what was ordered before is over."""
        self._orders.clear()

    def asked(self, order: Check, hosted: bool, state: str = "") -> Receipts:
        """A check is ordered: say what was got of the fragment and, when it is hosted here, for it."""
        self._orders[order.fragment] = order
        within = {key: digest for key, digest in self._receipts.items() if order.after < key[2] <= order.through}
        return Receipts(
            job=order.job,
            epoch=order.epoch,
            fragment=order.fragment,
            through=order.through,
            got=[named(key, d) for key, d in within.items() if self._dispatch.source(key[0], key[1]) == order.fragment],
            used=[
                named(key, d)
                for key, d in within.items()
                if hosted and order.fragment in self._dispatch.targets(key[0], key[1])
            ],
            state=state,
        )

    def show(self, request: Header, asker: str) -> Sent[P] | None:
        """What a SHOW asks for, if a check that `asker` makes needs it and it was made here."""
        try:
            kind = FrameKind[request.codec]
        except KeyError:
            return None
        key = (kind, request.edge, request.step, request.micro_batch)
        if kind not in SHOWN or not self._dispatch.ours(key):
            return None
        concerned = {self._dispatch.source(kind, request.edge), *self._dispatch.targets(kind, request.edge)}
        if not any(
            order.checker == asker and order.fragment in concerned and order.after < request.step <= order.through
            for order in self._orders.values()
        ):
            return None
        sent = self._log.find(key)
        return None if sent is None else Sent(replace(sent.header, kind=SHOWN[kind]), sent.parcel)
