"""What each op of an OP-DAG costs, and what crosses each cut, as arrays that the scheduler adds up (no torch).

All figures are for one micro-batch. Index `r` is a rank in `dag.body`; cumulative arrays have one entry more than the
body, so that `flops[last] - flops[first]` is the work of `body[first:last]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dag.cut import CutPoint, cut_points, differentiated
from dag.graph import Op, OpDag, TensorMeta
from dag.weight_gradients import separable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Crossings:
    """The edges of a partition as parallel arrays; position `i` is edge `i` of `dag.cut.cut(...)`."""

    value: Ints
    """Op id of the value."""
    source: Ints
    target: Ints
    gradient: Bools
    parameter: Bools
    """Parameter edges (tied weights) travel forward once per step, the others once per micro-batch."""

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True, eq=False)
class Workload:
    """Costs of the body of one OP-DAG. Cumulative arrays start with 0 and have `size + 1` entries."""

    size: int
    """Number of ops in the body."""
    flops: Floats
    """Cumulative forward FLOPs."""
    backward_flops: Floats
    convolution_flops: Floats
    """Cumulative: the part of `flops` that convolutions do, which a device may do faster or slower than matrix products."""
    backward_convolution_flops: Floats
    traffic: Floats
    """Cumulative bytes that forward reads and writes; views move none."""
    backward_traffic: Floats
    calls: Floats
    """Cumulative calls that compute (views left out); each costs a device its fixed time per op."""
    backward_calls: Floats
    parameter_bytes: Floats
    """Cumulative bytes of parameters, at the first op that uses each."""
    parameters: Floats
    """Cumulative number of parameters, at the first op that uses each."""
    parameter_elements: Floats
    weights_share: Floats
    """By rank, not cumulative: the part of an op's backward that can wait (`dag.weight_gradients`)."""
    waiting: Floats
    """Cumulative bytes of the gradients of these ops' values, which are kept meanwhile."""
    saved: Floats
    """Cumulative bytes that autograd keeps from forward to backward."""
    stored: Floats
    """Cumulative bytes of buffers and constants, at the first op that needs each."""
    cut_points: tuple[CutPoint, ...]
    """Every legal cut, ascending."""
    value_bytes: Ints
    """Bytes of each op's value, by op id."""
    metas: tuple[TensorMeta | None, ...]
    """Shape and dtype of each op's single value, by op id."""
    pair_value: Ints
    """Uses of values that may cross a cut, sorted by op id: the value's op id,"""
    pair_source: Ints
    """... the rank where it is made (for a parameter: first used),"""
    pair_user: Ints
    """... the rank of the op that uses it,"""
    pair_gradient: Bools
    """... whether a gradient comes back from this use,"""
    pair_parameter: Bools
    """... and whether it is a parameter."""
    shared_parameters: tuple[tuple[int, tuple[int, ...]], ...]
    """Parameters that several ops use (tied weights): op id and the ranks of its users."""

    @cached_property
    def floating(self) -> Bools:
        """By op id, whether its single value is of a floating type."""
        return np.array([meta is not None and meta.is_floating for meta in self.metas], dtype=bool)

    @property
    def positions(self) -> Ints:
        """Legal cut positions, ascending."""
        return np.array([point.position for point in self.cut_points], dtype=np.int64)

    def crossings(self, cuts: tuple[int, ...] | list[int]) -> Crossings:
        """The edges that `dag.cut.cut(dag, cuts)` makes, in its order, without building the fragments."""
        bounds = np.array(cuts, dtype=np.int64)
        source = np.searchsorted(bounds, self.pair_source, side="right")
        target = np.searchsorted(bounds, self.pair_user, side="right")
        crossing = np.flatnonzero(source != target)
        fragments = len(cuts) + 1
        key = self.pair_value[crossing] * fragments + target[crossing]
        unique, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        gradient = np.zeros(len(unique), dtype=bool)
        np.logical_or.at(gradient, inverse, self.pair_gradient[crossing])
        picked = crossing[first]
        return Crossings(
            value=self.pair_value[picked],
            source=source[picked].astype(np.int64),
            target=target[picked].astype(np.int64),
            gradient=gradient,
            parameter=self.pair_parameter[picked],
        )


def workload(dag: OpDag) -> Workload:
    """Add up the costs of `dag`'s body."""
    rank = {op: position for position, op in enumerate(dag.body)}
    size = len(dag.body)
    columns = {
        name: np.zeros(size)
        for name in (
            "flops",
            "backward_flops",
            "convolution_flops",
            "backward_convolution_flops",
            "traffic",
            "backward_traffic",
            "calls",
            "backward_calls",
            "waiting",
            "saved",
        )
    }
    gradients = differentiated(dag)
    weights_share = np.zeros(size)
    for op_id in separable(dag, gradients):
        # Two products of the same three sizes: one for the input, one for the weights.
        weights_share[rank[op_id]] = 0.5
        columns["waiting"][rank[op_id]] = dag.ops[op_id].output_bytes
    for op_id, position in rank.items():
        op = dag.ops[op_id]
        moved = _traffic(dag, op)
        back = op_id in gradients and not op.no_grad
        columns["flops"][position] = op.flops
        columns["traffic"][position] = moved
        columns["calls"][position] = moved > 0
        columns["saved"][position] = op.saved_bytes
        if back:
            columns["backward_flops"][position] = op.backward_flops
            # Backward reads the gradient and what was saved, and writes a gradient for each input.
            columns["backward_traffic"][position] = 2 * moved
            columns["backward_calls"][position] = 2.0 * (moved > 0)
        if op.kind == "call" and op.target.startswith("aten.conv"):
            columns["convolution_flops"][position] = columns["flops"][position]
            columns["backward_convolution_flops"][position] = columns["backward_flops"][position]
    parameter_bytes, parameters, parameter_elements, stored = (np.zeros(size) for _ in range(4))
    shared = []
    for op in dag.ops:
        if op.kind == "parameter":
            users = tuple(rank[user] for user in dag.users[op.id] if user in rank)
            if users:
                parameter_bytes[min(users)] += op.meta.nbytes
                parameters[min(users)] += 1
                parameter_elements[min(users)] += op.meta.elements
            if len(users) > 1:
                shared.append((op.id, users))
        elif op.kind in ("buffer", "constant"):
            first = _first_need(dag, op.id, rank)
            if first is not None:
                stored[first] += op.output_bytes
    return Workload(
        size=size,
        flops=_cumulative(columns["flops"]),
        backward_flops=_cumulative(columns["backward_flops"]),
        convolution_flops=_cumulative(columns["convolution_flops"]),
        backward_convolution_flops=_cumulative(columns["backward_convolution_flops"]),
        traffic=_cumulative(columns["traffic"]),
        backward_traffic=_cumulative(columns["backward_traffic"]),
        calls=_cumulative(columns["calls"]),
        backward_calls=_cumulative(columns["backward_calls"]),
        weights_share=weights_share,
        waiting=_cumulative(columns["waiting"]),
        saved=_cumulative(columns["saved"]),
        parameter_bytes=_cumulative(parameter_bytes),
        parameters=_cumulative(parameters),
        parameter_elements=_cumulative(parameter_elements),
        stored=_cumulative(stored),
        cut_points=cut_points(dag),
        value_bytes=np.array([op.output_bytes for op in dag.ops], dtype=np.int64),
        metas=tuple(op.outputs[0] if op.outputs else None for op in dag.ops),
        **_pairs(dag, rank, gradients),
        shared_parameters=tuple(shared),
    )


def _cumulative(column: Floats) -> Floats:
    return np.concatenate(([0.0], np.cumsum(column)))


def _traffic(dag: OpDag, op: Op) -> int:
    """Bytes that a call reads and writes in training; 0 for views and for taking one output of several."""
    if op.kind != "call" or op.only_in == "evaluation" or op.target == "py.getitem" or (op.aliases and not op.mutates):
        return 0
    return op.output_bytes + sum(dag.ops[source].output_bytes for source in op.inputs())


def _first_need(dag: OpDag, op_id: int, rank: dict[int, int]) -> int | None:
    """Rank of the first body op that needs this constant, directly or through other constants."""
    pending, seen, ranks = [op_id], {op_id}, []
    while pending:
        for user in dag.users[pending.pop()]:
            if user in rank:
                ranks.append(rank[user])
            elif user not in seen:
                seen.add(user)
                pending.append(user)
    return min(ranks, default=None)


def _pairs(dag: OpDag, rank: dict[int, int], gradients: frozenset[int]) -> dict[str, Any]:
    value, source, user_rank, gradient, parameter = [], [], [], [], []
    for op in dag.ops:
        users = [user for user in dag.users[op.id] if user in rank]
        if not users or not (op.kind == "parameter" or op.id in rank):
            continue
        made = rank[op.id] if op.id in rank else min(rank[user] for user in users)
        for user in users:
            value.append(op.id)
            source.append(made)
            user_rank.append(rank[user])
            gradient.append(op.id in gradients and user in gradients)
            parameter.append(op.kind == "parameter")
    return {
        "pair_value": np.array(value, dtype=np.int64),
        "pair_source": np.array(source, dtype=np.int64),
        "pair_user": np.array(user_rank, dtype=np.int64),
        "pair_gradient": np.array(gradient, dtype=bool),
        "pair_parameter": np.array(parameter, dtype=bool),
    }
