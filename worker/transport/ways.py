"""How the values of each edge travel in each direction: worked out once for a plan; a change of placement changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.settings import TopK, parse, reuses
from dag.cut import Partition
from dag.graph import TensorMeta
from fusion.errors import PlanError
from fusion.plan import CodecChoice, Plan
from fusion.units import format_bytes
from fusion.wire import FrameKind


@dataclass(frozen=True, slots=True)
class Way:
    """How the values of one edge travel in one direction."""

    meta: TensorMeta
    dtype: torch.dtype
    codec: str
    options: dict[str, float]
    feedback: bool
    """Whether what the codec loses is added to the next value."""
    reuses: bool
    """Whether they are a gradient's values at the places that the activation kept."""


def ways(plan: Plan, partition: Partition) -> dict[tuple[bool, int], Way]:
    """(backward, edge) -> way. Raises `PlanError` for a gradient that reuses places which its activation does not have."""
    found: dict[tuple[bool, int], Way] = {}
    for edge in partition.edges:
        choice = plan.codecs.get(edge.index, CodecChoice())
        dtype = getattr(torch, edge.meta.dtype)
        if reuses(choice.backward) and not isinstance(parse(choice.forward, choice.options), TopK):
            raise PlanError(f"edge {edge.index}: {choice.backward} back needs top-k forward, not {choice.forward}")
        for backward, codec in ((False, choice.forward), (True, choice.backward)):
            feedback = choice.error_feedback and codec != "none" and edge.kind == "activation"
            again = backward and edge.gradient and reuses(codec)
            found[backward, edge.index] = Way(edge.meta, dtype, codec, dict(choice.options), feedback, again)
    return found


def misfit(value: Tensor, meta: TensorMeta, kind: FrameKind, edge: int) -> PlanError:
    """A value that is not what the OP-DAG says would be refused at its other end: fail here, where the reason is."""
    return PlanError(
        f"{kind.name.lower()} of edge {edge} came out as {value.dtype}{list(value.shape)}, "
        f"the OP-DAG says {meta.dtype}{list(meta.shape)} ({format_bytes(meta.nbytes)})"
    )
