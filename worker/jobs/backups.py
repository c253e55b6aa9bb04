"""Snapshots between workers: those of our fragments on their way to backup workers, those of others that we hold.

A host announces a snapshot (piece 0: size, checksum, how long it may take); its backup worker asks for one piece after the
other (`worker/protocol/pieces.py`), so that a snapshot never puts more between the messages of the training than the link carries in a moment.
Once whole and verified it is held until a newer one is the common snapshot. A fragment's former host keeps the snapshot with which the fragment moved, so that two have
it until then. Called from the data plane's thread, the compute thread and the event loop.
"""

from __future__ import annotations

import hashlib
import math
import threading
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Literal

import msgpack
import safetensors.torch
from pydantic import BaseModel
from torch import Tensor

from dag.cut import Fragment
from dag.graph import OpDag
from fusion.errors import BlobError
from fusion.messages import BackupFailed, Holding
from fusion.units import format_bytes
from fusion.wire import FrameKind, Header
from worker.jobs.state_blob import StateBlob
from worker.machine.memory import MemoryGuard
from worker.protocol.pieces import PATIENCE, Pieces, piece_bytes

# Parameters and what optimizers keep of them, at most; beside them come buffers and a header.
_COPIES = 4
_NOTHING_FITS = (2**62, 0, -1, 0.0)

Transmit = Callable[[str, Header, memoryview | None], None]


@dataclass
class _Offer:
    """A snapshot of ours that its backup worker has not got yet."""

    to: str
    size: int
    checksum: int
    blob: StateBlob
    seconds: float
    """Over which it is to be spread; 0: as fast as it goes."""
    heard_at: float


@dataclass
class _Held:
    """A snapshot of another worker's fragment, whole or on its way."""

    source: str
    size: int
    checksum: int
    data: bytearray
    pieces: Pieces
    waiting: bool = False
    """Somebody looks again when more pieces are due."""
    verified: bool = False


class Backups:
    """The snapshots of one worker in one job.

    `transmit(to, header, payload)` sends a message; `report` tells the coordinator; `epoch` is the plan epoch of the moment;
    `later(seconds, call)` calls on some thread after so long, unless all is over by then. `on_error` hears of what fails on the
    thread that reads snapshots.
    """

    def __init__(
        self,
        job: str,
        dag: OpDag,
        fragments: tuple[Fragment, ...],
        memory: MemoryGuard,
        transmit: Transmit,
        report: Callable[[BaseModel], None],
        epoch: Callable[[], int],
        later: Callable[[float, Callable[[], None]], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._job = job
        self._limits = [_state_limit(dag, fragment) for fragment in fragments]
        self._memory = memory
        self._transmit = transmit
        self._report = report
        self._epoch = epoch
        self._later = later
        self._on_error = on_error
        self._seconds = 0.0
        self._lock = threading.RLock()
        self._offers: dict[int, tuple[int, _Offer]] = {}
        self._held: dict[tuple[int, int], _Held] = {}
        self._kept: dict[tuple[int, int], StateBlob] = {}
        self._common = -1
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="snapshots")
        self._closed = False

    def spread(self, seconds: float) -> None:
        """Snapshots that are announced from now on are to take so long; 0: as fast as they go."""
        self._seconds = seconds

    def offer(self, fragment: int, step: int, to: str, state: Mapping[str, Tensor]) -> None:
        """Send this state to a backup worker, in the background; it takes the place of an older one under way."""
        self._beside(partial(self._announce, fragment, step, to, state))

    def handle(self, header: Header, sender: str, value: Tensor | None) -> None:
        """A SNAPSHOT or SNAPSHOT_WANT that was admitted."""
        with self._lock:
            if header.kind is FrameKind.SNAPSHOT_WANT:
                self._send_piece(header, sender)
            elif value is not None and header.micro_batch == 0:
                self._announced(header, sender, bytes(value.numpy().data))
            elif value is not None:
                self._piece(header, value)

    def poke(self) -> None:
        """Call about once a second: what was lost on the way is asked for, or announced, again."""
        with self._lock:
            now = monotonic()
            for (fragment, step), held in self._held.items():
                for number in held.pieces.overdue(now):
                    self._want(held.source, fragment, step, number)
            for fragment, (step, offer) in self._offers.items():
                if offer.heard_at < now - PATIENCE:
                    offer.heard_at = now
                    self._send_announcement(fragment, step, offer)

    def commit(self, step: int) -> bool:
        """`step` is the common snapshot: what is older is of no use, and ours of that step have arrived. Whether that is new here."""
        with self._lock:
            new = step > self._common
            self._common = max(self._common, step)
            self._held = {key: held for key, held in self._held.items() if key[1] >= step}
            self._kept = {key: blob for key, blob in self._kept.items() if key[1] >= step}
            self._offers = {fragment: offer for fragment, offer in self._offers.items() if offer[0] > step}
            return new

    def abandon(self, after: int) -> None:
        """The plan is another one from `after` on: a round of a later step comes to nothing, and links are needed for the replay."""
        with self._lock:
            self._held = {key: held for key, held in self._held.items() if key[1] <= after}
            self._offers = {fragment: offer for fragment, offer in self._offers.items() if offer[0] <= after}

    def keep(self, fragment: int, step: int) -> None:
        """The fragment moves away with the snapshot of `step`, which we sent: hold it for its new host. Before `commit`."""
        with self._lock:
            at, offer = self._offers.get(fragment, (-1, None))
            if offer is not None and at == step:
                self._kept[fragment, step] = offer.blob

    def state(self, fragment: int, step: int) -> dict[str, Tensor]:
        """The state that is held of a fragment after `step`. Raises `BlobError` when it is not here."""
        with self._lock:
            held, kept = self._held.get((fragment, step)), self._kept.get((fragment, step))
            if held is not None and held.verified:
                data = bytes(held.data)
            elif kept is not None:
                data = b"".join(kept.pieces())
            else:
                raise BlobError(f"no snapshot of fragment {fragment} after step {step} is held here")
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        return tensors

    def digest(self, fragment: int, step: int) -> str:
        """Half of the SHA-256 of the snapshot that is held; empty when it is not here."""
        with self._lock:
            held = self._held.get((fragment, step))
        return hashlib.sha256(held.data).hexdigest()[:32] if held is not None and held.verified else ""

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._closed = True  # Pieces come in until the route is closed.
        self._hasher.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._offers.clear()
            self._held.clear()
            self._kept.clear()

    def _beside(self, work: Callable[[], None]) -> None:
        """Have it done on the thread that reads snapshots, unless all is over."""
        with self._lock:
            if not self._closed:
                self._hasher.submit(self._or_report, work)

    def _or_report(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self._on_error(error)

    # Ours, on their way out ----------------------------------------------------------------------------------------

    def _announce(self, fragment: int, step: int, to: str, state: Mapping[str, Tensor]) -> None:
        blob = StateBlob(state)
        offer = _Offer(to, blob.size, blob.checksum(), blob, self._seconds, monotonic())
        with self._lock:
            if step > self._common:
                self._offers[fragment] = (step, offer)
                self._send_announcement(fragment, step, offer)

    def _send_announcement(self, fragment: int, step: int, offer: _Offer) -> None:
        announcement = memoryview(msgpack.packb([offer.size, offer.checksum, self._common, offer.seconds]))
        self._transmit(offer.to, self._header(fragment, step, 0, len(announcement)), announcement)

    def _send_piece(self, header: Header, sender: str) -> None:
        step, offer = self._offers.get(header.edge, (0, None))
        each = piece_bytes(offer.size, offer.seconds) if offer is not None else 0
        begin = (header.micro_batch - 1) * each
        if offer is None or step != header.step or offer.to != sender or not 0 <= begin < offer.size:
            return
        offer.heard_at = monotonic()
        piece = memoryview(offer.blob.read(begin, begin + each))
        self._transmit(sender, self._header(header.edge, step, header.micro_batch, len(piece)), piece)

    # Those of others, on their way in ------------------------------------------------------------------------------

    def _announced(self, header: Header, sender: str, announcement: bytes) -> None:
        fragment, step = header.edge, header.step
        known = self._held.get((fragment, step))
        size, checksum, common, seconds = _read(announcement)
        if known is not None and (known.checksum, known.source) == (checksum, sender):
            if known.verified:
                self._report(self._holding(fragment, step, known))
            return
        if step <= self._common:
            return
        if size > self._limits[fragment]:
            limit = format_bytes(self._limits[fragment])
            self._fail(
                fragment, step, "corrupt", f"a snapshot of {format_bytes(size)}; this fragment has {limit} at most"
            )
            return
        room = self._memory.limit - self._memory.used()
        if size > room:
            self._fail(
                fragment,
                step,
                "memory",
                f"the snapshot of fragment {fragment} takes {format_bytes(size)}, {format_bytes(max(0, room))} are free "
                f"of the {format_bytes(self._memory.limit)} that this worker may use",
            )
            return
        # The host had heard of the common snapshot when this one was ordered; we may not have. Others came to nothing.
        kept = (common, self._common)
        for stale in [at for at in self._held if at[0] == fragment and at[1] < step and at[1] not in kept]:
            del self._held[stale]
        pieces = Pieces(size, seconds, monotonic())
        held = self._held[fragment, step] = _Held(sender, size, checksum, bytearray(size), pieces)
        self._ask(fragment, step, held)

    def _piece(self, header: Header, value: Tensor) -> None:
        fragment, step, number = header.edge, header.step, header.micro_batch
        held = self._held.get((fragment, step))
        if held is None or not held.pieces.lacks(number):
            return
        begin, end = held.pieces.span(number)
        if len(value) != end - begin:
            return
        held.data[begin:end] = value.numpy().data
        held.pieces.came(number, monotonic())
        self._ask(fragment, step, held)
        if held.pieces.complete:
            self._beside(partial(self._verify, fragment, step, held))

    def _ask(self, fragment: int, step: int, held: _Held) -> None:
        """Ask for the pieces that are due, now and when more are."""
        for number in held.pieces.due(monotonic()):
            self._want(held.source, fragment, step, number)
        wait = held.pieces.wait(monotonic())
        if wait is not None and not held.waiting:
            held.waiting = True
            self._later(wait, partial(self._ask_later, fragment, step, held))

    def _ask_later(self, fragment: int, step: int, held: _Held) -> None:
        with self._lock:
            held.waiting = False
            if self._held.get((fragment, step)) is held:
                self._ask(fragment, step, held)

    def _verify(self, fragment: int, step: int, held: _Held) -> None:
        checksum = zlib.crc32(held.data)
        with self._lock:
            if self._held.get((fragment, step)) is not held:
                return
            if checksum != held.checksum:
                del self._held[fragment, step]
                self._fail(
                    fragment,
                    step,
                    "corrupt",
                    f"the snapshot of fragment {fragment} after step {step} has another checksum",
                )
                return
            held.verified = True
            self._report(self._holding(fragment, step, held))

    def _want(self, to: str, fragment: int, step: int, number: int) -> None:
        self._transmit(to, Header(self._job, self._epoch(), FrameKind.SNAPSHOT_WANT, fragment, step, number), None)

    def _holding(self, fragment: int, step: int, held: _Held) -> Holding:
        return Holding(job=self._job, epoch=self._epoch(), step=step, fragment=fragment, bytes=held.size)

    def _fail(self, fragment: int, step: int, cause: Literal["corrupt", "memory"], message: str) -> None:
        self._report(
            BackupFailed(job=self._job, epoch=self._epoch(), step=step, fragment=fragment, cause=cause, message=message)
        )

    def _header(self, fragment: int, step: int, number: int, size: int) -> Header:
        return Header(self._job, self._epoch(), FrameKind.SNAPSHOT, fragment, step, number, "none", "uint8", (size,))


def _state_limit(dag: OpDag, fragment: Fragment) -> int:
    """More bytes than any state of this fragment has."""
    parameters = sum(dag.ops[op].output_bytes for op in fragment.parameters)
    buffers = sum(dag.ops[op].output_bytes for op in fragment.written_buffers)
    # What error feedback keeps: float32, whatever the value's dtype.
    crossings = (*fragment.inputs, *fragment.outputs)
    residuals = sum(4 * math.prod(edge.meta.shape) for edge in crossings)
    entries = 1 + len(fragment.parameters) + len(fragment.written_buffers) + len(crossings)
    # Moments may be kept in float32 for parameters of half the size.
    return 2 * _COPIES * parameters + buffers + residuals + 4096 * entries


def _read(announcement: bytes) -> tuple[int, int, int, float]:
    """Size, checksum, common step and seconds to take; an announcement that is none counts as one that nothing fits."""
    try:
        read = msgpack.unpackb(announcement, max_array_len=4, max_str_len=0, max_map_len=0, max_bin_len=0)
        size, checksum, common, seconds = read
    except Exception:
        return _NOTHING_FITS
    numbers = type(size) is int and size >= 0 and type(checksum) is int and type(common) is int
    if numbers and type(seconds) is float and 0.0 <= seconds < math.inf:
        return size, checksum, common, seconds
    return _NOTHING_FITS
