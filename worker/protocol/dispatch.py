"""Which peers a message goes to under the plan of the moment, and what waits until a peer follows that plan too. Sans I/O.

A fragment that has changed hosts since the last common snapshot is *moved*. What goes to it, and what comes from it, is held
back until the peer has said SWITCHED for our epoch: before, it would refuse the one and not expect the other. Fragments that
a peer has kept need nothing from before the step that they are in, which SWITCHED tells as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from dag.cut import Partition
from fusion.plan import Plan
from fusion.wire import FrameKind
from worker.protocol.pacing import STEPS_AHEAD
from worker.protocol.replay_log import Key, Parcel, ReplayLog, Sent

P = TypeVar("P", bound=Parcel)


class Dispatch:
    """The view of one worker."""

    def __init__(self, plan: Plan, partition: Partition, worker: str) -> None:
        self._partition = partition
        self._worker = worker
        self._plan = plan
        self.moved: frozenset[int] = frozenset()
        """The fragments that another worker hosts than at the common snapshot."""
        # What each peer has said of itself: the plan epoch it follows, and the first step its kept fragments still need.
        self._epochs: dict[str, int] = {}
        self._floors: dict[str, int] = {}

    @property
    def peers(self) -> tuple[str, ...]:
        """The other workers of the plan."""
        return tuple(worker for worker in self._plan.workers if worker != self._worker)

    @property
    def settled(self) -> bool:
        """Whether nothing is held back for anybody."""
        return not self.unheard

    @property
    def unheard(self) -> tuple[str, ...]:
        """The peers for whom something may be held back, as they have not said that they follow the plan."""
        return tuple(peer for peer in self.peers if not self._follows(peer)) if self.moved else ()

    @property
    def furthest(self) -> int:
        """The highest first step that a peer's kept fragments were in when it switched; 0 when none has said so."""
        return max(self._floors.values(), default=0)

    def switch(self, plan: Plan) -> None:
        """Follow another plan, which places some fragments elsewhere."""
        pairs = zip(self._plan.placement, plan.placement, strict=True)
        self.moved |= {fragment for fragment, (before, now) in enumerate(pairs) if before != now}
        self._plan = plan

    def heard(self, peer: str, epoch: int, floor: int) -> bool:
        """A peer follows `epoch`; True when something may have been held back until now."""
        if epoch < self._epochs.get(peer, 0):
            return False
        self._epochs[peer], self._floors[peer] = epoch, floor
        return bool(self.moved) and self._follows(peer)

    def settle(self) -> None:
        """There is a newer common snapshot: nobody needs anything from before the moves, if all have heard of them."""
        if self.settled:
            self.moved = frozenset()

    def source(self, kind: FrameKind, index: int) -> int:
        """The fragment that makes these messages."""
        if kind is FrameKind.NORMS:
            return index
        edge = self._partition.edges[index]
        return edge.target if kind in (FrameKind.GRADIENT, FrameKind.DONE) else edge.source

    def targets(self, kind: FrameKind, index: int) -> Iterable[int]:
        """The fragments that these messages are for."""
        if kind is FrameKind.NORMS:
            return range(len(self._plan.placement))
        edge = self._partition.edges[index]
        return (edge.source if kind in (FrameKind.GRADIENT, FrameKind.DONE) else edge.target,)

    def receivers(self, kind: FrameKind, index: int) -> tuple[str, ...]:
        """The workers that these messages are for, this one included."""
        return tuple(dict.fromkeys(self._plan.placement[fragment] for fragment in self.targets(kind, index)))

    def due(self, key: Key, to: str) -> bool:
        """Whether a message may go to this peer now."""
        if not self.moved:
            return True
        kind, index, step = key[0], key[1], key[2]
        moved_there = any(
            fragment in self.moved and self._plan.placement[fragment] == to for fragment in self.targets(kind, index)
        )
        if not moved_there and self.source(kind, index) not in self.moved:
            return True
        if not self._follows(to):
            return False
        # A free-running fragment waits for what its receivers say of an earlier step than its own.
        needed = self._floors[to] - (STEPS_AHEAD if kind is FrameKind.DONE else 0)
        return moved_there or step >= needed

    def stayed(self, key: Key) -> bool:
        """Whether who gets this message has hosted its fragment all along, and so has what it sent for it itself."""
        return self.moved.isdisjoint(self.targets(key[0], key[1]))

    def held_back(self, peer: str, log: ReplayLog[P]) -> list[Sent[P]]:
        """What has been held back for a peer that follows the plan now; some of it may go a second time.

        What a fragment made that has left this worker is not ours to send any more: its new host makes it again.
        """
        keys = ((sent, sent.header.key) for sent in log)
        return [
            sent for sent, key in keys if self.ours(key) and self._concerns_moved(key, peer) and self.due(key, peer)
        ]

    def ours(self, key: Key) -> bool:
        """Whether the fragment that makes this message is hosted here."""
        return self._plan.placement[self.source(key[0], key[1])] == self._worker

    def _concerns_moved(self, key: Key, to: str) -> bool:
        kind, index = key[0], key[1]
        there = [fragment for fragment in self.targets(kind, index) if self._plan.placement[fragment] == to]
        return bool(there) and (
            self.source(kind, index) in self.moved or any(fragment in self.moved for fragment in there)
        )

    def _follows(self, peer: str) -> bool:
        return self._epochs.get(peer, -1) >= self._plan.epoch
