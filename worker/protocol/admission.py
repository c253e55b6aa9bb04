"""What the plan lets arrive at this worker: every header is checked here before memory is taken for its payload.

Sans I/O and without torch. A message must be of this job and run, come from the worker that the plan says makes it (known
by its authenticated key), belong to a step and micro-batch that exist, and have exactly the edge's shape, dtype, codec and
payload size. Of an earlier plan epoch of the same run, what a worker made that still hosts the fragment is as good as new:
the same key has the same bits (docs/adr/0008). What a fragment's former host sends is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from compress.settings import Settings, parse, reuses, self_contained
from dag.cut import Edge, Partition
from fusion.errors import FrameError, PlanError
from fusion.plan import Plan
from fusion.units import format_bytes
from fusion.wire import FrameKind, Header

MAX_PIECE_BYTES = 2**20
_VALUES = frozenset({FrameKind.ACTIVATION, FrameKind.GRADIENT, FrameKind.EVALUATION, FrameKind.NORMS})
_RESENT = frozenset(
    kind.name
    for kind in (FrameKind.ACTIVATION, FrameKind.GRADIENT, FrameKind.EVALUATION, FrameKind.NORMS, FrameKind.DONE)
)

Category = Literal[
    "malformed", "unknown job", "stopped job", "other epoch", "sender", "unknown key", "layout", "size", "places"
]


class Refused(FrameError):
    """A message that is not let in; `category` is what is counted."""

    def __init__(self, category: Category, message: str) -> None:
        super().__init__(message)
        self.category = category


@dataclass(frozen=True, slots=True)
class Layout:
    """What a value that may arrive looks like; `codec` applies to the direction it travels in."""

    source: str
    """The worker it comes from."""
    shape: tuple[int, ...]
    dtype: str
    codec: str
    settings: Settings
    may_be_null: bool
    exact_bytes: int | None
    """Payload size, where it does not depend on the values."""
    answered: bool = False
    """Whether its gradient comes back with values at the places that it kept, and nothing else."""


class Admission:
    """The rules for one worker, one job and one plan.

    `norms` has the number of home parameters of each fragment (empty without clipping); `last_step` is the job's last
    step; `first_epoch` is the plan epoch with which the run began; with `verify` there may be spot checks.
    """

    def __init__(
        self,
        job: str,
        plan: Plan,
        partition: Partition,
        worker: str,
        *,
        micro_batches: int,
        last_step: int,
        eval_batches: int = 0,
        norms: Sequence[int] = (),
        first_epoch: int | None = None,
        verify: bool = False,
    ) -> None:
        self.job = job
        self._plan = plan
        self._verify = verify
        self.epoch = plan.epoch
        self._first_epoch = plan.epoch if first_epoch is None else first_epoch
        self._micro_batches = micro_batches
        self._last_step = last_step
        self._eval_batches = eval_batches
        self._edges = partition.edges
        self._placement = plan.placement
        self._worker = worker
        self._forward = {
            edge.index: _layout(plan, edge, plan.placement[edge.source], backward=False)
            for edge in partition.edges
            if plan.placement[edge.target] == worker
        }
        self._backward = {
            edge.index: _layout(plan, edge, plan.placement[edge.target], backward=True)
            for edge in partition.edges
            if edge.gradient and plan.placement[edge.source] == worker
        }
        plain = parse("none", {})
        self._norms = {
            fragment: Layout(plan.placement[fragment], (count,), "float32", "none", plain, False, 4 * count)
            for fragment, count in enumerate(norms)
        }

        self._layouts = {
            FrameKind.ACTIVATION: self._forward,
            FrameKind.EVALUATION: self._forward,
            FrameKind.GRADIENT: self._backward,
            FrameKind.NORMS: self._norms,
        }

    def require_room(self, max_frame_bytes: int) -> None:
        """Raises `PlanError` when a value that should arrive is larger than any message may be."""
        for kind, layouts in self._layouts.items():
            for edge, layout in layouts.items():
                size = layout.settings.max_payload_bytes(layout.shape, layout.dtype)
                if size > max_frame_bytes:
                    raise PlanError(
                        f"{kind.name.lower()} {edge} takes up to {format_bytes(size)} and a message "
                        f"{format_bytes(max_frame_bytes)} at most; make train.micro_batch smaller"
                    )

    def check(self, header: Header, sender: str, payloads: Sequence[int]) -> Layout | None:
        """The layout of an admitted value, or None for a message that carries none (RESEND, DONE, SWITCHED ...).

        `sender` is the authenticated worker, `payloads` the byte length of each payload frame. Raises `Refused`.
        """
        if header.job != self.job:
            raise Refused("unknown job", f"message of job {header.job!r}, which this worker does not have")
        if header.epoch < self._first_epoch:
            raise Refused("other epoch", f"message of plan epoch {header.epoch}, this run began at {self._first_epoch}")
        match header.kind:
            case FrameKind.RESEND | FrameKind.UNDER_WAY | FrameKind.MISSED:
                self._check_request(header, sender, payloads)
            case FrameKind.DONE:
                self._check_done(header, sender, payloads)
            case FrameKind.SWITCHED | FrameKind.SNAPSHOT_WANT | FrameKind.SHOW:
                self._check_known(header, sender)
                if payloads:
                    raise Refused("layout", f"a {header.kind.name} with a payload")
                if header.kind is FrameKind.SWITCHED and header.step > self._last_step + 1:
                    raise Refused("unknown key", f"SWITCHED at step {header.step}, the last is {self._last_step}")
            case FrameKind.MARK:
                self._check_known(header, sender)
                if payloads or len(header.shape) > 1:
                    raise Refused("layout", "a MARK with a payload, or of several sizes")
            case FrameKind.PROBE | FrameKind.PROBED:
                raise Refused("unknown key", f"{header.kind.name} belongs to no job")
            case FrameKind.SNAPSHOT:
                return self._check_snapshot(header, sender, payloads)
            case FrameKind.SHOWN_ACTIVATION | FrameKind.SHOWN_GRADIENT | FrameKind.SHOWN_NORMS:
                return self._check_shown(header, sender, payloads)
            case _:
                layout = self._layout(header)
                self._check_sender(sender, layout.source, header)
                _check_payload(header, layout, payloads)
                return layout
        return None

    def _check_shown(self, header: Header, sender: str, payloads: Sequence[int]) -> Layout:
        """Shown for a spot check, by its host, as it was sent; whether it was asked for is seen where it is used."""
        plan, edge = self._plan, self._edges[header.edge] if header.edge < len(self._edges) else None
        layout: Layout | None = None
        if header.kind is FrameKind.SHOWN_NORMS:
            layout = self._norms.get(header.edge)
        elif edge is not None and header.kind is FrameKind.SHOWN_ACTIVATION:
            layout = _layout(plan, edge, plan.placement[edge.source], backward=False)
        elif edge is not None and edge.gradient:
            layout = _layout(plan, edge, plan.placement[edge.target], backward=True)
        if layout is None or not self._verify:
            raise self._unexpected(header, f"{header.kind.name} {header.edge} is nothing that is checked here")
        self._check_sender(sender, layout.source, header)
        if not 1 <= header.step <= self._last_step or header.micro_batch >= self._micro_batches:
            raise Refused("unknown key", f"{header.kind.name} of step {header.step}, micro-batch {header.micro_batch}")
        _check_payload(header, layout, payloads)
        return layout

    def _check_done(self, header: Header, sender: str, payloads: Sequence[int]) -> None:
        edge = self._edges[header.edge] if header.edge < len(self._edges) else None
        if edge is None or self._placement[edge.source] != self._worker:
            raise self._unexpected(header, f"edge {header.edge} does not leave this worker")
        self._check_sender(sender, self._placement[edge.target], header)
        if payloads or not 1 <= header.step <= self._last_step:
            raise Refused("unknown key", f"DONE of step {header.step} with {len(payloads)} payloads")

    def _check_known(self, header: Header, sender: str) -> None:
        if not sender:
            raise Refused("sender", f"{header.kind.name} from somebody who has no part in this job")

    def _check_snapshot(self, header: Header, sender: str, payloads: Sequence[int]) -> Layout:
        """A piece of a snapshot: from the fragment's host. Whether it is wanted, and fits, is seen where it is kept."""
        if header.edge >= len(self._placement):
            raise Refused("unknown key", f"snapshot of fragment {header.edge} of {len(self._placement)}")
        self._check_sender(sender, self._placement[header.edge], header)
        if len(payloads) != 1 or not 0 < payloads[0] <= MAX_PIECE_BYTES or header.shape != (payloads[0],):
            raise Refused("size", f"a piece of a snapshot with {list(payloads)} bytes, said to be {list(header.shape)}")
        if header.dtype != "uint8" or header.codec != "none" or not 0 <= header.step <= self._last_step:
            raise Refused("layout", f"a piece of a snapshot as {header.codec} {header.dtype}, step {header.step}")
        return Layout(sender, header.shape, "uint8", "none", parse("none", {}), False, payloads[0])

    def _unexpected(self, header: Header, why: str) -> Refused:
        """A message that this plan does not expect: most likely of the plan before, or of the one to come."""
        if header.epoch != self.epoch:
            return Refused(
                "other epoch", f"message of plan epoch {header.epoch}, this worker is at {self.epoch}: {why}"
            )
        return Refused("unknown key", why)

    def _layout(self, header: Header) -> Layout:
        kind, step, micro_batch = header.kind, header.step, header.micro_batch
        layout = self._layouts[kind].get(header.edge)
        if layout is None:
            raise self._unexpected(header, f"{kind.name} {header.edge} is not for this worker")
        last, count = self._last_step, self._micro_batches
        if kind is FrameKind.NORMS:
            count = 1
        elif kind is FrameKind.EVALUATION:
            count = self._eval_batches
        elif kind is FrameKind.ACTIVATION and self._edges[header.edge].kind == "parameter":
            # The value after the last update serves the last evaluation.
            last, count = last + 1, 1
        if not 1 <= step <= last or micro_batch >= count:
            raise Refused("unknown key", f"{kind.name} {header.edge} of step {step}, micro-batch {micro_batch}")
        return layout

    def _check_request(self, header: Header, sender: str, payloads: Sequence[int]) -> None:
        if payloads:
            raise Refused("layout", f"a {header.kind.name} with a payload")
        if header.codec not in _RESENT:
            raise Refused(
                "malformed", f"{header.kind.name} of {header.codec!r}, which is no kind of message that is kept"
            )
        if sender not in self._placement:
            raise Refused("sender", f"{header.kind.name} from {sender!r}, which has no part in this job")
        bound = len(self._placement) if header.codec == FrameKind.NORMS.name else len(self._edges)
        if header.edge >= bound:
            raise Refused("unknown key", f"{header.kind.name} of {header.codec} {header.edge}, there are {bound}")

    def _check_sender(self, sender: str, expected: str, header: Header) -> None:
        if sender != expected:
            if header.epoch != self.epoch:
                raise self._unexpected(header, f"it came from {sender!r}, which is not {expected!r}")
            raise Refused("sender", f"{header.kind.name} {header.edge} came from {sender!r}, not from {expected!r}")


def is_spoilt(header: Header, error: Exception) -> bool:
    """Whether a message was refused for its payload alone: it is awaited, from whom it came, and its sender keeps the same bytes."""
    if isinstance(error, Refused):
        return header.kind in _VALUES and error.category in ("layout", "size")
    return header.kind in _VALUES


def _layout(plan: Plan, edge: Edge, source: str, *, backward: bool) -> Layout:
    choice = plan.codecs.get(edge.index)
    name = "none" if choice is None else choice.backward if backward else choice.forward
    settings = parse(name, choice.options if choice is not None and name != "none" else {})
    exact = settings.payload_bytes(edge.meta.shape, edge.meta.dtype)
    answered = choice is not None and not backward and edge.gradient and reuses(choice.backward)
    return Layout(source, edge.meta.shape, edge.meta.dtype, name, settings, backward, exact, answered)


def _check_payload(header: Header, layout: Layout, payloads: Sequence[int]) -> None:
    if (
        len(payloads) == 1
        and payloads[0] == layout.exact_bytes
        and header.shape == layout.shape
        and header.dtype == layout.dtype
        and header.codec == layout.codec
    ):
        return
    what = f"{header.kind.name} {header.edge}"
    if not payloads and layout.may_be_null and header.dtype == "" and header.shape == () and header.codec == "none":
        return
    fits = header.codec in (layout.codec, self_contained(layout.codec))
    if not fits or (header.dtype, header.shape) != (layout.dtype, layout.shape):
        raise Refused(
            "layout",
            f"{what} came as {header.codec} {header.dtype}{list(header.shape)}, "
            f"the plan says {layout.codec} {layout.dtype}{list(layout.shape)}",
        )
    if len(payloads) != 1:
        raise Refused("size", f"{what} came with {len(payloads)} payloads, not one")
    exact = layout.exact_bytes
    if exact is not None and payloads[0] != exact:
        raise Refused("size", f"{what} came with {payloads[0]} bytes, {exact} expected")
    if exact is None and payloads[0] > layout.settings.max_payload_bytes(layout.shape, layout.dtype):
        raise Refused("size", f"{what} came with {payloads[0]} bytes, more than any payload of {layout.codec}")
