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

Floats = NDArray[np.float64]
ADATOPK_FACTOR = 3.0
"""FusionLLM's factor on the ratio (a value and its index cost about three times a value). Its place in the formula is
recalled from the paper with medium certainty, so the wire ratio is reported beside the nominal one."""


def choose_codecs(
    compression: CompressionSpec,
    workload: Workload,
    crossings: Crossings,
    placement: Sequence[str],
    network: Network,
) -> dict[int, CodecChoice]:
    """Edge index -> codec for every crossing floating activation that does not travel as it is.

    `bf16`, `int8` and `topk` are the same on every edge, also between fragments of one worker, so that the bits don't
    depend on the placement. `adatopk` follows each link: r_l = max(1, 3 r T_l / max T), and ratio 1 means `none`.
    """
    edges = [edge for edge in range(len(crossings)) if _compressible(workload, crossings, edge)]
    if compression.codec == "none":
        return {}
    if compression.codec in ("bf16", "int8"):
        return {edge: CodecChoice(forward=compression.codec, backward=compression.codec) for edge in edges}
    if compression.codec == "topk":
        return {edge: _topk(compression.ratio) for edge in edges if compression.ratio > 1}
    return _adaptive(compression, workload, crossings, edges, placement, network)


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
        meta = workload.metas[crossings.value[edge]]
        if meta is not None:
            forward[edge] = parse(choice.forward, choice.options).expected_payload_bytes(meta.shape, meta.dtype)
            backward[edge] = parse(choice.backward, choice.options).expected_payload_bytes(meta.shape, meta.dtype)
    return forward, backward


def device_names(devices: Sequence[Device], indices: Sequence[int]) -> tuple[str, ...]:
    """Names of the devices at these indices."""
    return tuple(devices[index].name for index in indices)
