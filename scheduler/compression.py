"""Which codec each edge of a plan gets, and how many bytes its messages then take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from compress.settings import REUSED, TopK, parse, reuses, with_options
from dag.workload import Crossings, Workload
from fusion.plan import CodecChoice
from fusion.spec import CompressionSpec
from scheduler.devices import Device, Network
from scheduler.harm import MOST_HARM, Measured, ladder
from scheduler.hidden import LADDER, hidden
from scheduler.pairs import Pair, pairs_of

ADATOPK_FACTOR = 3.0
"""FusionLLM's factor on the ratio (a value and its index cost about three times a value). Its place in the formula is
recalled from the paper with medium certainty, so the wire ratio is reported beside the nominal one."""

_TOPK = ("topk", "topk-sampled", "adatopk")


def choose_codecs(
    compression: CompressionSpec,
    workload: Workload,
    crossings: Crossings,
    placement: Sequence[str],
    network: Network,
    busy_seconds: float,
) -> dict[int, CodecChoice]:
    """Edge index -> codec for every crossing floating activation that does not travel as it is.

    `bf16`, `int8`, `topk` and the like are the same on every edge, also between fragments of one worker, so that the bits don't
    depend on the placement. `adatopk` and `adaint` follow each link's time T_l for uncompressed messages:
    r_l = max(1, f r T_l / max T), where f is 3 for top-k, whose every value brings its place along, and 1 for integers.
    Top-k keeps one value in r_l, and gradients come back at the same places: they are the gradient of what was sent, where a top-k
    of their own would be of something else (docs/adr/0013). Integers take the mildest width that saves r_l times, or the
    narrowest. Ratio 1 means `none`.
    `auto` gives each pair of workers the least harmful codec whose messages of one micro-batch take no longer than
    `busy_seconds`, the compute of the busiest worker, so that they hide behind it. What they cost adds up over the edges: where it
    comes to more than `MOST_HARM`, messages may take as much longer as it needs to stay below.
    """
    edges = np.flatnonzero(workload.floating[crossings.value] & ~crossings.parameter).tolist()
    chosen = _by_rule(compression, workload, crossings, edges, placement, network, busy_seconds)
    plain = CodecChoice()
    ruled = {edge: chosen.get(edge, plain) for edge in edges}
    # Edges share a few choices: each is settled once. By identity, as options can't be hashed.
    distinct = {id(choice): choice for choice in ruled.values()}
    settled = {key: with_directions(compression, choice) for key, choice in distinct.items()}
    found = {edge: settled[id(choice)] for edge, choice in ruled.items()}
    return {edge: choice for edge, choice in found.items() if (choice.forward, choice.backward) != ("none", "none")}


def with_directions(compression: CompressionSpec, choice: CodecChoice) -> CodecChoice:
    """What the spec says of a direction goes before the rule; error feedback where it asks for it.

    A top-k that the spec names without a ratio has the rule's on that edge, 1 being none, or where the rule is no top-k the
    spec's. A gradient can reuse the places of an activation that kept some; where all of it travels, so does the gradient.
    """
    forward, backward = compression.forward or choice.forward, compression.backward or choice.backward
    options = choice.options
    if "ratio" not in options:
        ratio = 1.0 if compression.codec in _TOPK else compression.ratio
        forward, backward = ("none" if ratio == 1 and _lacks_ratio(name) else name for name in (forward, backward))
        if _lacks_ratio(forward) or _lacks_ratio(backward):
            options = {**options, "ratio": ratio}
    if compression.backward is None and reuses(backward) and not isinstance(parse(forward, options), TopK):
        backward = choice.forward  # A rule's gradients have no places to come back at.
    if reuses(backward):
        backward = _reused(backward, forward, options)
    lossy = (forward, backward) != ("none", "none")
    return CodecChoice(
        forward=forward,
        backward=backward,
        options=options if lossy else {},
        error_feedback=compression.error_feedback and lossy,
    )


def _lacks_ratio(name: str) -> bool:
    """Whether this is a top-k that does not say its own ratio."""
    base, _, written = name.partition(":")
    return isinstance(parse(base), TopK) and "ratio" not in {item.partition("=")[0] for item in written.split(",")}


def _reused(backward: str, forward: str, options: Mapping[str, float]) -> str:
    """The gradients' codec on an edge, with the activations' ratio."""
    kept, found = parse(forward, options), parse(backward, options)
    if not isinstance(kept, TopK) or not isinstance(found, TopK):
        return "none"
    return backward if found.ratio == kept.ratio else with_options(backward, ratio=kept.ratio)


def _by_rule(
    compression: CompressionSpec,
    workload: Workload,
    crossings: Crossings,
    edges: Sequence[int],
    placement: Sequence[str],
    network: Network,
    busy_seconds: float,
) -> dict[int, CodecChoice]:
    """What `compression.codec` gives each edge; an edge that is not named travels as it is."""
    named = [name for name in (compression.forward, compression.backward) if name is not None]
    settled = len(named) == 2 and not (compression.codec in _TOPK and any(map(_lacks_ratio, named)))
    if compression.codec == "none" or settled:
        return {}
    if compression.codec in ("topk", "topk-sampled"):
        return dict.fromkeys(edges, _topk(compression.ratio, compression.codec)) if compression.ratio > 1 else {}
    if compression.codec not in ("adatopk", "adaint", "auto"):
        return dict.fromkeys(edges, CodecChoice(forward=compression.codec, backward=compression.codec))
    if compression.codec == "auto":
        # Gradients come back at an activation's places only where the rule chooses the activation's codec.
        rungs = [row for row in LADDER if compression.forward is None or not reuses(row.backward)]
        return hidden(workload, crossings, edges, placement, network, rungs, busy_seconds)
    pairs = list(pairs_of(crossings, edges, placement))
    chosen = _adaptive(compression, workload, crossings, pairs, network)
    return {
        edge: choice
        for pair, choice in zip(pairs, chosen, strict=True)
        if choice.forward != "none"
        for edge in pair.edges
    }


def _adaptive(
    compression: CompressionSpec,
    workload: Workload,
    crossings: Crossings,
    pairs: Sequence[Pair],
    network: Network,
) -> list[CodecChoice]:
    """The per-link rule of `adatopk` and `adaint`."""
    seconds = [_plain_seconds(workload, crossings, pair, network) for pair in pairs]
    slowest = max(seconds, default=0.0)
    factor = ADATOPK_FACTOR if compression.codec == "adatopk" else 1.0
    ratios = [max(1.0, factor * compression.ratio * needed / slowest) if slowest else 1.0 for needed in seconds]
    if compression.codec == "adatopk":
        return [_topk(ratio) if ratio > 1 else CodecChoice() for ratio in ratios]
    rows = [_width(ratio) for ratio in ratios]
    harmful = sum(len(pair.edges) for pair, row in zip(pairs, rows, strict=True) if row.harm > 0)
    return [row.choice for row in (_width(ratio, MOST_HARM / max(1, harmful)) for ratio in ratios)]


def _plain_seconds(workload: Workload, crossings: Crossings, pair: Pair, network: Network) -> float:
    """T_l: what one micro-batch's uncompressed messages take on the slower of the pair's two ways."""
    forward, backward = (
        float(workload.value_bytes[crossings.value[list(edges)]].sum())
        for edges in (pair.edges, pair.returning(crossings))
    )
    out, back = network.link(pair.source, pair.target), network.link(pair.target, pair.source)
    return max(out.transfer(forward), back.transfer(backward) if backward else 0.0)


def _width(ratio: float, most_harm: float = MOST_HARM) -> Measured:
    """The mildest integers that save `ratio` times of float32 bytes, or the narrowest that are harmless enough."""
    rungs = [row for row in ladder(most_harm) if row.forward == "none" or row.forward.startswith("int")]
    return next((row for row in rungs if _saved(row.choice) >= ratio), rungs[-1])


def _saved(choice: CodecChoice) -> float:
    """float32 bytes over wire bytes, both directions together."""
    forward, backward = factors(choice)
    return 2 / (forward + backward)


def _topk(ratio: float, codec: str = "topk") -> CodecChoice:
    return CodecChoice(forward=codec, backward=REUSED, options={"ratio": ratio})


def factors(choice: CodecChoice) -> tuple[float, float]:
    """Wire bytes over float32 bytes of a large tensor, forward and back."""
    shape, raw = (2**16,), 4.0 * 2**16
    forward, backward = (parse(name, choice.options) for name in (choice.forward, choice.backward))
    return (
        forward.expected_payload_bytes(shape, "float32") / raw,
        backward.expected_payload_bytes(shape, "float32") / raw,
    )


def expected_factors(compression: CompressionSpec) -> tuple[tuple[float, float], ...]:
    """Wire bytes over float32 bytes, forward and back, that a crossing may come to: strongest first, each once.

    Before the links are known, a codec that adapts to them may take as few bytes as its strongest setting, or all.
    """
    plain = CodecChoice()
    match compression.codec:
        case "auto":
            every = next(row for row in reversed(LADDER) if row.harm == 0)  # However many tensors have it.
            choices = [LADDER[-1].choice, every.choice, plain]
        case "adaint":
            choices = [_width(compression.ratio).choice, plain]
        case "adatopk":
            choices = [_topk(compression.ratio), plain]
        case "topk" | "topk-sampled":
            choices = [_topk(compression.ratio)]
        case name:
            choices = [CodecChoice(forward=name, backward=name)]
    return tuple(dict.fromkeys(factors(with_directions(compression, choice)) for choice in choices))


def device_names(devices: Sequence[Device], indices: Sequence[int]) -> tuple[str, ...]:
    """Names of the devices at these indices."""
    return tuple(devices[index].name for index in indices)
