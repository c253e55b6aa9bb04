"""Frames of the data plane: a msgpack header and at most a few raw tensor buffers, nothing that could be executed.

A message is `[header, payload...]`. The header names everything that identifies it; the receiver checks it against the
plan before it takes memory for the payload. Decoding raises `FrameError` with what was wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NoReturn

import msgpack

from fusion.errors import FrameError, VersionError

PROTOCOL_VERSION = 1
MAX_HEADER_BYTES = 4096
_HEADER_BUFFER = 256
"""Bytes to begin with: the packer's own 256 KiB are new memory for each message."""
MAX_RANK = 16


class FrameKind(IntEnum):
    """What a message carries."""

    ACTIVATION = 0
    """An edge's value, forward; `micro_batch` is 0 for a parameter edge."""
    GRADIENT = 1
    """The gradient of an edge's value, back. A null gradient has no payload."""
    EVALUATION = 2
    """An edge's value in an evaluation pass; `micro_batch` counts evaluation batches."""
    NORMS = 3
    """One fragment's per-parameter gradient norms (float32); `edge` is the sending fragment's index."""
    RESEND = 4
    """Please send again what (edge, step, micro_batch, wanted kind) names; `codec` holds the wanted kind's name."""
    DONE = 5
    """The edge's target fragment has used everything of `step`: a source that no gradient comes back to is paced by this."""
    SWITCHED = 6
    """The sender follows plan epoch `epoch` now; fragments that it has kept still need everything from `step` on."""
    SNAPSHOT = 7
    """Piece `micro_batch` (from 1) of fragment `edge`'s snapshot after `step`; piece 0 announces size and hash."""
    SNAPSHOT_WANT = 8
    """Please send piece `micro_batch` of fragment `edge`'s snapshot after `step`."""
    PROBE = 9
    """Measures a link, outside of any job: please answer with PROBED of the same `step`, and `shape` bytes."""
    PROBED = 10
    """A PROBE has arrived, whole."""
    MARK = 11
    """Comes before (`micro_batch` 0) and after (1) a large message of `shape` bytes: the times tell how fast the link is."""

    SHOW = 12
    """Please show, for a spot check, the message that (edge, step, micro-batch, kind) names; `codec` holds the kind's name."""
    SHOWN_ACTIVATION = 13
    """An ACTIVATION as it was sent then, to the worker that checks."""
    SHOWN_GRADIENT = 14
    SHOWN_NORMS = 15

    UNDER_WAY = 16
    """Answers a RESEND, with the same fields: what it names went out before this, and arrives before it if it is not lost."""
    MISSED = 17
    """Like RESEND, after UNDER_WAY: what it names was lost, or refused."""


_KINDS = {int(kind): kind for kind in FrameKind}
_INTEGERS = frozenset({int})


@dataclass(frozen=True, slots=True)
class Header:
    """Identity and layout of one message. `(kind, edge, step, micro_batch)` is its key within a job's plan epoch."""

    job: str
    epoch: int
    kind: FrameKind
    edge: int
    step: int
    micro_batch: int
    codec: str = "none"
    dtype: str = ""
    shape: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[FrameKind, int, int, int]:
        return (self.kind, self.edge, self.step, self.micro_batch)


def encode_header(header: Header) -> bytes:
    packed: bytes = msgpack.packb(
        (
            PROTOCOL_VERSION,
            header.job,
            header.epoch,
            int(header.kind),
            header.edge,
            header.step,
            header.micro_batch,
            header.codec,
            header.dtype,
            header.shape,
        ),
        buf_size=_HEADER_BUFFER,
    )
    return packed


def decode_header(data: bytes | memoryview) -> Header:
    """Read a header, or raise `FrameError` (malformed) or `VersionError` (another protocol version)."""
    if len(data) > MAX_HEADER_BYTES:
        raise FrameError(f"header of {len(data)} bytes is larger than {MAX_HEADER_BYTES}")
    try:
        fields: Any = msgpack.unpackb(
            data, use_list=False, max_str_len=256, max_array_len=MAX_RANK, max_map_len=0, max_bin_len=0, max_ext_len=0
        )
    except Exception as error:
        raise FrameError(f"header is not msgpack: {error}") from None
    if not isinstance(fields, tuple) or not fields:
        raise FrameError("header is not a list")
    if fields[0] != PROTOCOL_VERSION:
        raise VersionError(f"message of protocol version {fields[0]!r}, this worker speaks {PROTOCOL_VERSION}")
    if len(fields) != 10:
        raise FrameError(f"header has {len(fields)} fields, expected 10")
    _, job, epoch, kind, edge, step, micro_batch, codec, dtype, shape = fields
    # Every message passes here, most of them well-formed: one test for those, and the reason only for the others.
    if not (
        type(job) is type(codec) is type(dtype) is str
        and type(epoch) is type(kind) is type(edge) is type(step) is type(micro_batch) is int
        and min(epoch, kind, edge, step, micro_batch) >= 0
        and type(shape) is tuple
        and _INTEGERS.issuperset(map(type, shape))
        and min(shape, default=0) >= 0
    ):
        _explain(fields)
    frame_kind = _KINDS.get(kind)
    if frame_kind is None:
        raise FrameError(f"unknown message kind {kind}")
    return Header(job, epoch, frame_kind, edge, step, micro_batch, codec, dtype, shape)


def _explain(fields: tuple[Any, ...]) -> NoReturn:
    """Say which field is not what it must be."""
    _, job, epoch, kind, edge, step, micro_batch, codec, dtype, _ = fields
    for name, value in (("job", job), ("codec", codec), ("dtype", dtype)):
        if not isinstance(value, str):
            raise FrameError(f"header field {name} is not a string")
    for name, value in (("epoch", epoch), ("kind", kind), ("edge", edge), ("step", step), ("micro_batch", micro_batch)):
        if type(value) is not int or value < 0:
            raise FrameError(f"header field {name} is not a natural number")
    raise FrameError("header field shape is not a list of natural numbers")
