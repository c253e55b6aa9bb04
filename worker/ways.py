"""Where the values of each edge go from here, and how: worked out once for a plan."""

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
    """Where the values of one edge go in one direction, and how."""

    to: str
    meta: TensorMeta
    dtype: torch.dtype
    codec: str
    options: dict[str, float]


def ways(plan: Plan, partition: Partition) -> dict[tuple[bool, int], Way]:
    """(backward, edge) -> way."""
    found: dict[tuple[bool, int], Way] = {}
    for edge in partition.edges:
        choice = plan.codecs.get(edge.index, CodecChoice())
        dtype = getattr(torch, edge.meta.dtype)
        for backward, end, codec in ((False, edge.target, choice.forward), (True, edge.source, choice.backward)):
            way = Way(plan.placement[end], edge.meta, dtype, codec, dict(choice.options))
            found[backward, edge.index] = way
    return found


def misfit(value: Tensor, meta: TensorMeta, kind: FrameKind, edge: int) -> PlanError:
    """A value that is not what the OP-DAG says would be refused at its other end: fail here, where the reason is."""
    return PlanError(
        f"{kind.name.lower()} of edge {edge} came out as {value.dtype}{list(value.shape)}, "
        f"the OP-DAG says {meta.dtype}{list(meta.shape)} ({format_bytes(meta.nbytes)})"
    )
