"""What may arrive: exactly what the plan says, from whom it says."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worker_cases import make_case, partition_of

from fusion.errors import FrameError, VersionError
from fusion.plan import CodecChoice
from fusion.wire import FrameKind, Header, decode_header, encode_header
from worker.protocol.admission import Admission, Refused

CASE = make_case(clip=1.0, eval_every=2)


def admission(codecs: dict[int, CodecChoice] | None = None) -> Admission:
    """Worker b has the middle of three fragments: a -> b -> c."""
    prepare = CASE.prepare(("a", "b", "c"), codecs=codecs)
    partition = partition_of(prepare, CASE)
    return Admission(
        "job-1",
        prepare.plan,
        partition,
        "b",
        micro_batches=3,
        last_step=4,
        eval_batches=2,
        norms=[len(fragment.parameters) for fragment in partition.fragments],
    )


def edges() -> tuple[int, int]:
    """The edges into b from a, and from b into c."""
    partition = partition_of(CASE.prepare(("a", "b", "c")), CASE)
    into = next(e.index for e in partition.edges if (e.source, e.target) == (0, 1))
    out = next(e.index for e in partition.edges if (e.source, e.target) == (1, 2))
    return into, out


INTO, OUT = edges()
ACTIVATION = Header("job-1", 0, FrameKind.ACTIVATION, INTO, 2, 1, "none", "float32", (2, 6))
GRADIENT = Header("job-1", 0, FrameKind.GRADIENT, OUT, 2, 1, "none", "float32", (2, 6))


def test_what_the_plan_says_is_let_in() -> None:
    rules = admission()
    layout = rules.check(ACTIVATION, "a", [48])
    assert layout is not None
    assert layout.shape == (2, 6)
    assert rules.check(GRADIENT, "c", [48]) is not None
    null = Header("job-1", 0, FrameKind.GRADIENT, OUT, 2, 1)
    assert rules.check(null, "c", []) is not None
    assert rules.check(replace(ACTIVATION, kind=FrameKind.EVALUATION), "a", [48]) is not None
    assert rules.check(Header("job-1", 0, FrameKind.RESEND, OUT, 2, 1, "ACTIVATION"), "c", []) is None
    count = len(partition_of(CASE.prepare(("a", "b", "c")), CASE).fragments[2].parameters)
    norms = Header("job-1", 0, FrameKind.NORMS, 2, 2, 0, "none", "float32", (count,))
    assert rules.check(norms, "c", [4 * count]) is not None
    assert rules.check(Header("job-1", 0, FrameKind.DONE, OUT, 2, 0), "c", []) is None


@pytest.mark.parametrize(
    ("header", "sender", "payloads", "category"),
    [
        (replace(ACTIVATION, job="other"), "a", [48], "unknown job"),
        (replace(ACTIVATION, epoch=1), "c", [48], "other epoch"),
        (ACTIVATION, "c", [48], "sender"),
        (ACTIVATION, "", [48], "sender"),
        (replace(ACTIVATION, edge=OUT), "a", [48], "unknown key"),
        (replace(ACTIVATION, edge=10**6), "a", [48], "unknown key"),
        (replace(ACTIVATION, step=0), "a", [48], "unknown key"),
        (replace(ACTIVATION, step=5), "a", [48], "unknown key"),
        (replace(ACTIVATION, micro_batch=3), "a", [48], "unknown key"),
        (replace(ACTIVATION, kind=FrameKind.EVALUATION, micro_batch=2), "a", [48], "unknown key"),
        (replace(GRADIENT, edge=INTO), "c", [48], "unknown key"),
        (replace(ACTIVATION, shape=(6, 2)), "a", [48], "layout"),
        (replace(ACTIVATION, shape=(2**40, 2**40)), "a", [48], "layout"),
        (replace(ACTIVATION, dtype="float64"), "a", [96], "layout"),
        (replace(ACTIVATION, codec="int8"), "a", [48], "layout"),
        (Header("job-1", 0, FrameKind.ACTIVATION, INTO, 2, 1), "a", [], "layout"),
        (ACTIVATION, "a", [47], "size"),
        (ACTIVATION, "a", [49], "size"),
        (ACTIVATION, "a", [], "size"),
        (ACTIVATION, "a", [24, 24], "size"),
        (Header("job-1", 0, FrameKind.RESEND, OUT, 2, 1, "RESEND"), "c", [], "malformed"),
        (Header("job-1", 0, FrameKind.RESEND, OUT, 2, 1, "__class__"), "c", [], "malformed"),
        (Header("job-1", 0, FrameKind.RESEND, OUT, 2, 1, "ACTIVATION"), "x", [], "sender"),
        (Header("job-1", 0, FrameKind.RESEND, OUT, 2, 1, "ACTIVATION"), "c", [1], "layout"),
        (Header("job-1", 0, FrameKind.UNDER_WAY, OUT, 2, 1, "UNDER_WAY"), "c", [], "malformed"),
        (Header("job-1", 0, FrameKind.UNDER_WAY, OUT, 2, 1, "ACTIVATION"), "x", [], "sender"),
        (Header("job-1", 0, FrameKind.MISSED, 99, 2, 1, "ACTIVATION"), "c", [], "unknown key"),
        (Header("job-1", 0, FrameKind.DONE, INTO, 2, 0), "a", [], "unknown key"),
        (Header("job-1", 0, FrameKind.DONE, OUT, 9, 0), "c", [], "unknown key"),
        (Header("job-1", 0, FrameKind.NORMS, 2, 2, 0, "none", "float32", (99,)), "c", [396], "layout"),
    ],
)
def test_anything_else_is_refused_and_named(header: Header, sender: str, payloads: list[int], category: str) -> None:
    with pytest.raises(Refused) as refused:
        admission().check(header, sender, payloads)
    assert refused.value.category == category


def test_after_an_adoption_what_came_from_the_former_host_is_refused() -> None:
    """Of an earlier epoch of the run, what a worker sent that still hosts the fragment is as good as new."""
    prepare = CASE.prepare(("d", "b", "c"), epoch=5)
    partition = partition_of(prepare, CASE)
    rules = Admission("job-1", prepare.plan, partition, "b", micro_batches=3, last_step=4, first_epoch=4)
    old = replace(ACTIVATION, epoch=4)
    with pytest.raises(Refused) as refused:
        rules.check(old, "a", [48])
    assert refused.value.category == "other epoch"
    assert rules.check(replace(ACTIVATION, epoch=5), "d", [48]) is not None
    gradient = Header("job-1", 4, FrameKind.GRADIENT, OUT, 1, 0)
    assert rules.check(gradient, "c", []) is not None
    with pytest.raises(Refused, match="this run began at 4"):
        rules.check(replace(gradient, epoch=3), "c", [])


def test_what_is_shown_for_a_check_comes_from_the_host_in_the_layout_of_the_plan() -> None:
    prepare = CASE.prepare(("a", "b", "c"))
    partition = partition_of(prepare, CASE)

    def rules(verify: bool) -> Admission:
        return Admission("job-1", prepare.plan, partition, "b", micro_batches=3, last_step=4, verify=verify)

    # Of the edge from b to c, seen by its own maker: it may check c.
    edge = partition.edges[OUT]
    shape = tuple(edge.meta.shape)
    shown = Header("job-1", 0, FrameKind.SHOWN_GRADIENT, OUT, 2, 1, "none", edge.meta.dtype, shape)
    layout = rules(True).check(shown, "c", [edge.meta.nbytes])
    assert layout is not None
    assert layout.shape == shape
    assert rules(True).check(Header("job-1", 0, FrameKind.SHOW, OUT, 2, 1, "GRADIENT"), "c", []) is None
    for bad, sender, payloads in [
        (shown, "a", [edge.meta.nbytes]),
        (shown, "c", [edge.meta.nbytes - 1]),
        (replace(shown, edge=99), "c", [edge.meta.nbytes]),
        (replace(shown, step=5), "c", [edge.meta.nbytes]),
        (replace(shown, micro_batch=3), "c", [edge.meta.nbytes]),
        (replace(shown, kind=FrameKind.SHOWN_ACTIVATION), "c", [edge.meta.nbytes]),
        (replace(shown, kind=FrameKind.SHOWN_NORMS, edge=0), "a", [edge.meta.nbytes]),
        (replace(shown, kind=FrameKind.SHOW), "c", [edge.meta.nbytes]),
        (replace(shown, kind=FrameKind.SHOW), "", []),
    ]:
        with pytest.raises(Refused):
            rules(True).check(bad, sender, payloads)
    with pytest.raises(Refused, match="nothing that is checked"):
        rules(False).check(shown, "c", [edge.meta.nbytes])


def test_pieces_of_snapshots_come_from_the_host_and_are_small() -> None:
    rules = admission()
    piece = Header("job-1", 0, FrameKind.SNAPSHOT, 0, 2, 1, "none", "uint8", (1000,))
    layout = rules.check(piece, "a", [1000])
    assert layout is not None
    assert layout.shape == (1000,)
    for bad, sender, payloads in [
        (piece, "c", [1000]),
        (piece, "a", [1001]),
        (piece, "a", []),
        (replace(piece, shape=(2**21,)), "a", [2**21]),
        (replace(piece, edge=3), "a", [1000]),
        (replace(piece, dtype="float32"), "a", [1000]),
        (replace(piece, kind=FrameKind.SNAPSHOT_WANT), "a", [1000]),
        (replace(piece, kind=FrameKind.SWITCHED), "", []),
    ]:
        with pytest.raises(Refused):
            rules.check(bad, sender, payloads)


def test_nobody_needs_anything_from_beyond_the_end() -> None:
    """How far a peer says it is decides how full a log may get."""
    rules = admission()
    said = Header("job-1", 0, FrameKind.SWITCHED, 0, 1, 0)
    last = rules._last_step
    for step in (0, 1, last, last + 1):
        assert rules.check(replace(said, step=step), "a", []) is None
    for step in (last + 2, 2**62):
        with pytest.raises(Refused, match="SWITCHED at step"):
            rules.check(replace(said, step=step), "a", [])


def test_a_codec_bounds_the_payload() -> None:
    rules = admission({INTO: CodecChoice(forward="topk", options={"ratio": 4})})
    packed = replace(ACTIVATION, codec="topk")
    assert rules.check(packed, "a", [11]) is not None
    with pytest.raises(Refused, match="more than any payload"):
        rules.check(packed, "a", [10_000])
    with pytest.raises(Refused, match="the plan says topk"):
        rules.check(ACTIVATION, "a", [48])


def test_a_gradient_may_come_with_and_without_its_places() -> None:
    rules = admission({OUT: CodecChoice(forward="topk", backward="topk-reused:ratio=4")})
    for name in ("topk-reused:ratio=4", "topk:ratio=4"):
        layout = rules.check(replace(GRADIENT, codec=name), "c", [6])
        assert layout is not None
        assert not layout.answered
    with pytest.raises(Refused, match="the plan says topk-reused:ratio=4"):
        rules.check(replace(GRADIENT, codec="topk"), "c", [6])
    rules = admission({INTO: CodecChoice(forward="topk", backward="topk-reused")})
    layout = rules.check(replace(ACTIVATION, codec="topk"), "a", [8])
    assert layout is not None
    assert layout.answered


@given(
    job=st.sampled_from(["job-1", "job-2", ""]),
    epoch=st.integers(0, 2),
    kind=st.sampled_from(FrameKind),
    edge=st.integers(0, 6),
    step=st.integers(0, 6),
    micro_batch=st.integers(0, 4),
    codec=st.sampled_from(["none", "ACTIVATION", "int8", "x"]),
    dtype=st.sampled_from(["float32", "", "int64"]),
    shape=st.sampled_from([(2, 6), (), (0,), (2**40,), (3,)]),
    sender=st.sampled_from(["a", "b", "c", ""]),
    payloads=st.lists(st.sampled_from([0, 12, 48, 2**31]), max_size=2),
)
@settings(max_examples=300, deadline=None)
def test_only_refused_ever_comes_out(
    job: str,
    epoch: int,
    kind: FrameKind,
    edge: int,
    step: int,
    micro_batch: int,
    codec: str,
    dtype: str,
    shape: tuple[int, ...],
    sender: str,
    payloads: list[int],
) -> None:
    header = Header(job, epoch, kind, edge, step, micro_batch, codec, dtype, shape)
    assert decode_header(encode_header(header)) == header
    try:
        layout = RULES.check(header, sender, payloads)
    except Refused:
        return
    assert header.job == "job-1"
    if layout is not None and payloads and kind is FrameKind.SNAPSHOT:
        assert payloads == [shape[0]]
    elif layout is not None and payloads:
        assert payloads == [48 if shape == (2, 6) else 4 * shape[0]]


RULES = admission()


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_a_frame_error(data: bytes) -> None:
    with contextlib.suppress(FrameError, VersionError):
        decode_header(data)
