"""How the values of each edge travel in each direction: worked out once for a plan; a change of placement changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def ways(plan: Plan, partition: Partition) -> dict[tuple[bool, int], Way]:
    """(backward, edge) -> way."""
    found: dict[tuple[bool, int], Way] = {}
    for edge in partition.edges:
        choice = plan.codecs.get(edge.index, CodecChoice())
        dtype = getattr(torch, edge.meta.dtype)
        for backward, codec in ((False, choice.forward), (True, choice.backward)):
            feedback = choice.error_feedback and codec != "none" and edge.kind == "activation"
            found[backward, edge.index] = Way(edge.meta, dtype, codec, dict(choice.options), feedback)
    return found


def misfit(value: Tensor, meta: TensorMeta, kind: FrameKind, edge: int) -> PlanError:
    """A value that is not what the OP-DAG says would be refused at its other end: fail here, where the reason is."""
    return PlanError(
        f"{kind.name.lower()} of edge {edge} came out as {value.dtype}{list(value.shape)}, "
        f"the OP-DAG says {meta.dtype}{list(meta.shape)} ({format_bytes(meta.nbytes)})"
    )
