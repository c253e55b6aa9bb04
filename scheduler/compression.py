"""Which codec each edge of a plan gets, and how many bytes its messages then take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from compress.settings import parse
from dag.workload import Crossings, Workload
from fusion.plan import CodecChoice
from fusion.spec import CompressionSpec
from scheduler.devices import Device, Network
from scheduler.harm import ladder

Floats = NDArray[np.float64]
ADATOPK_FACTOR = 3.0
"""FusionLLM's factor on the ratio (a value and its index cost about three times a value). Its place in the formula is
recalled from the paper with medium certainty, so the wire ratio is reported beside the nominal one."""

MOST_HARM = 0.005
"""`auto` uses codecs that cost at most this share of the loss in our measurement (`scheduler.harm`)."""


def choose_codecs(
    compression: CompressionSpec,
    workload: Workload,
    crossings: Crossings,
    placement: Sequence[str],
    network: Network,
    busy_seconds: float,
) -> dict[int, CodecChoice]:
    """Edge index -> codec for every crossing floating activation that does not travel as it is.

    `bf16`, `int8` and `topk` are the same on every edge, also between fragments of one worker, so that the bits don't
    depend on the placement. `adatopk` follows each link: r_l = max(1, 3 r T_l / max T), and ratio 1 means `none`.
    `auto` gives each directed pair of workers the least harmful codec whose messages of one micro-batch take no longer
    than `busy_seconds`, the compute of the busiest worker, so that they hide behind it.
    """
    edges = [edge for edge in range(len(crossings)) if _compressible(workload, crossings, edge)]
    if compression.codec == "none":
        return {}
    if compression.codec in ("bf16", "int8"):
        return {edge: CodecChoice(forward=compression.codec, backward=compression.codec) for edge in edges}
    if compression.codec == "topk":
        return {edge: _topk(compression.ratio) for edge in edges if compression.ratio > 1}
    if compression.codec == "adatopk":
        return _adaptive(compression, workload, crossings, edges, placement, network)
    return _hidden(workload, crossings, edges, placement, network, busy_seconds)


def _hidden(
    workload: Workload,
    crossings: Crossings,
    edges: Sequence[int],
    placement: Sequence[str],
    network: Network,
    busy_seconds: float,
) -> dict[int, CodecChoice]:
    """`auto`: per pair of workers, the first rung of the ladder of harm that hides; the last one where none does."""
    pairs: dict[tuple[str, str], list[int]] = {}
    for edge in edges:
        ends = (placement[crossings.source[edge]], placement[crossings.target[edge]])
        if ends[0] != ends[1]:
            pairs.setdefault(ends, []).append(edge)
    found: dict[int, CodecChoice] = {}
    for (source, target), mine in pairs.items():
        out, back = network.link(source, target), network.link(target, source)
        for row in ladder(MOST_HARM):
            sizes = [_pair_bytes(workload, int(crossings.value[edge]), row.choice) for edge in mine]
            forward = sum(size for size, _ in sizes) / out.bytes_per_second
            backward = (
                sum(size for edge, (_, size) in zip(mine, sizes, strict=True) if crossings.gradient[edge])
                / back.bytes_per_second
            )
            chosen = row.choice
            if max(forward, backward) <= busy_seconds:
                break
        if chosen.forward != "none":
            found.update(dict.fromkeys(mine, chosen))
    return found


def _compressible(workload: Workload, crossings: Crossings, edge: int) -> bool:
    meta = workload.metas[crossings.value[edge]]
    return not crossings.parameter[edge] and meta is not None and meta.is_floating


def _topk(ratio: float) -> CodecChoice:
    return CodecChoice(forward="topk", backward="topk", options={"ratio": ratio})


def _adaptive(
    compression: CompressionSpec,
    workload: Workload,
    crossings: Crossings,
    edges: Sequence[int],
    placement: Sequence[str],
    network: Network,
) -> dict[int, CodecChoice]:
    seconds = {}
    for edge in edges:
        source, target = placement[crossings.source[edge]], placement[crossings.target[edge]]
        link = network.link(source, target)
        count = float(workload.value_bytes[crossings.value[edge]])
        seconds[edge] = link.transfer(count) if source != target else 0.0
    slowest = max(seconds.values(), default=0.0)
    found = {}
    for edge, needed in seconds.items():
        ratio = max(1.0, ADATOPK_FACTOR * compression.ratio * needed / slowest) if slowest else 1.0
        if ratio > 1:
            found[edge] = _topk(ratio)
    return found


def message_bytes(workload: Workload, crossings: Crossings, codecs: Mapping[int, CodecChoice]) -> tuple[Floats, Floats]:
    """Expected bytes of each edge's message forward and of its gradient back."""
    forward = workload.value_bytes[crossings.value].astype(np.float64)
    backward = forward.copy()
    for edge, choice in codecs.items():
        forward[edge], backward[edge] = _pair_bytes(workload, int(crossings.value[edge]), choice)
    return forward, backward


def _pair_bytes(workload: Workload, value: int, choice: CodecChoice) -> tuple[int, int]:
    """Expected bytes of a value's message, and of its gradient's."""
    meta = workload.metas[value]
    if meta is None:
        return int(workload.value_bytes[value]), int(workload.value_bytes[value])
    forward, backward = (parse(name, choice.options) for name in (choice.forward, choice.backward))
    return (
        forward.expected_payload_bytes(meta.shape, meta.dtype),
        backward.expected_payload_bytes(meta.shape, meta.dtype),
    )


def expected_factors(compression: CompressionSpec) -> tuple[float, float]:
    """Wire bytes over float32 bytes, forward and back, to expect of a crossing before its link is known."""
    shape, raw = (2**16,), 4.0 * 2**16
    if compression.codec == "none":
        return (1.0, 1.0)
    if compression.codec == "auto":
        choice = ladder(MOST_HARM)[-1].choice
    elif compression.codec in ("topk", "adatopk"):
        choice = _topk(compression.ratio)
    else:
        choice = CodecChoice(forward=compression.codec, backward=compression.codec)
    forward, backward = (parse(name, choice.options) for name in (choice.forward, choice.backward))
    return (
        forward.expected_payload_bytes(shape, "float32") / raw,
        backward.expected_payload_bytes(shape, "float32") / raw,
    )


def device_names(devices: Sequence[Device], indices: Sequence[int]) -> tuple[str, ...]:
    """Names of the devices at these indices."""
    return tuple(devices[index].name for index in indices)
