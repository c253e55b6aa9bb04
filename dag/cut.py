"""Cuts an OP-DAG into fragments: contiguous ranges of its body, with the edges between them.

A cut position `p` (1 <= p < len(dag.body)) puts `body[:p]` left of the cut. Positions where an in-place write, or a
multi-output call and its outputs, would be torn apart are not legal, nor are those that a complex value would cross, nor those
between what evaluation alone reads and its reader. Cutting is deterministic, so every process that holds the same OP-DAG and the
same positions derives the same fragments and the same edge numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from dag.graph import OpDag, TensorMeta, refs_of
from dag.weight_gradients import postponed
from fusion.errors import PlanError


@dataclass(frozen=True, slots=True)
class Edge:
    """A value that one fragment makes and another needs.

    An `activation` travels forward once per micro-batch. A `parameter` (tied weights whose uses fall into several
    fragments) travels from its home once per step. Gradients travel back once per micro-batch for both.
    """

    index: int
    value: int
    source: int
    target: int
    kind: Literal["activation", "parameter"]
    meta: TensorMeta
    gradient: bool
    """Whether a gradient comes back."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """One piece of a partition: the unit that is placed, moved, backed up and replayed. All tuples hold op ids in order."""

    index: int
    ops: tuple[int, ...]
    """Calls to run for one micro-batch, in order, constants among them."""
    placeholders: tuple[int, ...]
    """Data it feeds itself."""
    parameters: tuple[int, ...]
    """Parameters at home here: this fragment's optimiser updates them."""
    borrowed: tuple[int, ...]
    """Parameters used here whose home is an earlier fragment."""
    written_buffers: tuple[int, ...]
    """Buffers that this fragment, and no other, writes."""
    constants: tuple[int, ...]
    """Read-only buffers and lifted constants that it needs; several fragments may hold a copy."""
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    has_loss: bool
    postponed: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """(op, parameters): those whose gradients are computed after all that other fragments wait for."""


@dataclass(frozen=True, slots=True)
class Partition:
    """An OP-DAG cut at `positions`."""

    positions: tuple[int, ...]
    fragments: tuple[Fragment, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True)
class CutPoint:
    """A legal cut position and the bytes that cross it for one micro-batch (values once, however many use them)."""

    position: int
    forward_bytes: int
    backward_bytes: int


def differentiated(dag: OpDag) -> frozenset[int]:
    """Ops whose value receives a gradient from the loss.

    A value that is written in place counts as it is after its last write, which no cut can come before: one that was made without
    a gradient has one when something with a gradient was written into it, or through a view of it.
    """
    wanting = {op.id for op in dag.ops if op.requires_grad}
    for op in dag.ops:
        # Batch norm writes its statistics too, but its value is another tensor.
        if op.requires_grad and not set(op.mutates).isdisjoint(op.aliases):
            wanting.update(written for written in op.mutates if dag.ops[written].kind == "call")
    found: set[int] = {dag.loss.id}
    read: set[int] = set()
    """Written values that something further on, with a gradient, reads: what was written reaches it."""
    for op in reversed(dag.ops):
        if op.id in wanting and (not found.isdisjoint(dag.users[op.id]) or not read.isdisjoint(op.mutates)):
            found.add(op.id)
        if op.id in found:
            read.update(source for source in op.inputs() if source in dag.written)
    return frozenset(found)


def bits_follow_cuts(dag: OpDag, partition: Partition) -> bool:
    """Whether these cuts may give gradients other bits than other cuts do, or none.

    That takes a value with three or more gradient contributions whose uses fall into several fragments: addition of
    floating-point numbers is commutative, but not associative.
    """

    def contributions(value: int) -> int:
        users = (dag.ops[user] for user in dag.users[value] if dag.ops[user].requires_grad)
        arguments = (arg for user in users for arg in (*user.args, *(named for _, named in user.kwargs)))
        return sum(ref == value for arg in arguments for ref in refs_of(arg))

    return any(edge.gradient and contributions(edge.value) > 2 for edge in partition.edges)


def _untearable(dag: OpDag) -> list[tuple[int, int]]:
    """Ranges of body ranks (first, last) that must stay in one fragment."""
    rank = {op: position for position, op in enumerate(dag.body)}
    spans: list[tuple[int, int]] = []
    for op in dag.ops:
        if op.id in rank:
            items = [rank[user] for user in dag.users[op.id] if dag.ops[user].target == "py.getitem"]
            if items:
                spans.append((rank[op.id], max(items)))
        if any(meta.is_complex for meta in op.outputs) and (op.id in rank or op.kind == "parameter"):
            places = [rank[place] for place in (op.id, *dag.users[op.id]) if place in rank]
            spans.append((min(places, default=0), max(places, default=0)))
    writers_of = _by_source(rank, ((op.id, op.mutates) for op in dag.ops))
    readers_of = _by_source(rank, dag.evaluation_inputs.items())
    for members in _storage_members(dag).values():
        writers = {op for member in members for op in writers_of.get(member, ())}
        if not writers:
            continue
        touching = {op for member in members for op in (member, *dag.users[member]) if op in rank} | writers
        touching |= {op for member in members for op in readers_of.get(member, ())}
        last_write = max(rank[op] for op in writers)
        lasting = any(dag.ops[member].kind != "call" for member in members)
        ranks = [rank[op] for op in touching]
        spans.append((min(ranks), max(ranks) if lasting else last_write))
    spans.extend(_read_in_evaluation(dag, rank))
    return spans


def _read_in_evaluation(dag: OpDag, rank: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Edges carry what training reads. What evaluation alone reads stays with its maker, or with an op that it comes to anyway."""
    for source, readers in _by_source(rank, dag.evaluation_inputs.items()).items():
        if source not in rank and dag.ops[source].kind != "parameter":
            continue
        there = sorted(rank[place] for place in (source, *dag.users[source]) if place in rank)
        for op in readers:
            nearest = there[max(0, bisect_right(there, rank[op]) - 1)]
            yield min(nearest, rank[op]), max(nearest, rank[op])


def _by_source(rank: Mapping[int, int], found: Iterable[tuple[int, Sequence[int]]]) -> dict[int, list[int]]:
    """What ops of the body read or write, the other way round."""
    result: dict[int, list[int]] = {}
    for op, sources in found:
        if op in rank:
            for source in sources:
                result.setdefault(source, []).append(op)
    return result


def _storage_members(dag: OpDag) -> dict[int, set[int]]:
    """For every op that is written in place: the ops that may share its storage."""
    root = list(range(len(dag.ops)))

    def find(op: int) -> int:
        while root[op] != op:
            root[op] = root[root[op]]
            op = root[op]
        return op

    for op in dag.ops:
        for other in op.aliases:
            root[find(op.id)] = find(other)
    members: dict[int, set[int]] = {}
    written_roots = {find(op) for op in dag.written}
    for op in dag.ops:
        if find(op.id) in written_roots:
            members.setdefault(find(op.id), set()).add(op.id)
    return members


def cut_points(dag: OpDag) -> tuple[CutPoint, ...]:
    """All legal cut positions, ascending, with the bytes that cross each."""
    size = len(dag.body)
    rank = {op: position for position, op in enumerate(dag.body)}
    blocked = [0] * (size + 1)
    for first, last in _untearable(dag):
        blocked[first + 1] += 1
        blocked[last + 1] -= 1
    forward = [0] * (size + 1)
    backward = [0] * (size + 1)
    gradients = differentiated(dag)
    for op in dag.body:
        uses = [rank[user] for user in dag.users[op] if user in rank]
        if not uses:
            continue
        last = max(uses)
        forward[rank[op] + 1] += dag.ops[op].output_bytes
        forward[last + 1] -= dag.ops[op].output_bytes
        wanting = [rank[user] for user in dag.users[op] if user in rank and user in gradients]
        if op in gradients and wanting:
            backward[rank[op] + 1] += dag.ops[op].output_bytes
            backward[max(wanting) + 1] -= dag.ops[op].output_bytes
    tears, ahead, back = accumulate(blocked), accumulate(forward), accumulate(backward)
    return tuple(
        CutPoint(position, forward_bytes, backward_bytes)
        for position, (torn, forward_bytes, backward_bytes) in enumerate(zip(tears, ahead, back, strict=True))
        if 1 <= position < size and not torn
    )


def cut(dag: OpDag, positions: Sequence[int]) -> Partition:
    """Cut `dag` at `positions` (ascending; empty for one fragment).

    Raises `PlanError` when a position is out of range, out of order, or would tear an in-place write apart.
    """
    size = len(dag.body)
    bounds = (0, *positions, size)
    if any(left >= right for left, right in pairwise(bounds)):
        raise PlanError(
            f"cut positions {list(positions)} do not fit: they must ascend within 1..{size - 1} "
            f"({size} ops make at most {size} fragments)"
        )
    legal = {point.position for point in cut_points(dag)}
    for position in positions:
        if position not in legal:
            op = dag.ops[dag.body[position]]
            raise PlanError(
                f"can't cut before op {op.name} ({op.target}): an in-place write, a multi-output call, a complex value or what "
                "evaluation alone reads spans it"
            )

    home_of_body = {op: bisect_right(bounds, rank) - 1 for rank, op in enumerate(dag.body)}
    gradients = differentiated(dag)
    edges = tuple(_edges(dag, home_of_body, gradients))
    fragments = tuple(
        _fragment(dag, index, dag.body[bounds[index] : bounds[index + 1]], edges, gradients)
        for index in range(len(bounds) - 1)
    )
    return Partition(tuple(positions), fragments, edges)


def _edges(dag: OpDag, home_of_body: dict[int, int], gradients: frozenset[int]) -> Iterable[Edge]:
    index = 0
    for op in dag.ops:
        users = [user for user in dag.users[op.id] if user in home_of_body]
        if op.kind == "parameter":
            if not users:
                continue
            kind: Literal["activation", "parameter"] = "parameter"
            source = min(home_of_body[user] for user in users)
        elif op.id in home_of_body:
            kind = "activation"
            source = home_of_body[op.id]
        else:
            continue
        for target in sorted({home_of_body[user] for user in users} - {source}):
            wanted = op.id in gradients and any(user in gradients for user in users if home_of_body[user] == target)
            yield Edge(index, op.id, source, target, kind, op.meta, wanted)
            index += 1


def _fragment(
    dag: OpDag, index: int, body: Sequence[int], edges: Sequence[Edge], gradients: frozenset[int]
) -> Fragment:
    inputs = tuple(edge for edge in edges if edge.target == index)
    arriving = {edge.value for edge in inputs}
    inside = set(body)
    needed: set[int] = set()
    pending = [source for op in body for source in (*dag.ops[op].inputs(), *dag.evaluation_inputs.get(op, ()))]
    while pending:
        op = pending.pop()
        if op in inside or op in needed or op in arriving:
            continue
        needed.add(op)
        pending.extend(dag.ops[op].inputs())

    def of_kind(*kinds: str) -> tuple[int, ...]:
        return tuple(sorted(op for op in needed if dag.ops[op].kind in kinds))

    stored = of_kind("buffer", "constant")
    return Fragment(
        index=index,
        ops=tuple(sorted(inside | set(of_kind("call")))),
        placeholders=of_kind("placeholder"),
        parameters=of_kind("parameter"),
        borrowed=tuple(sorted(edge.value for edge in inputs if edge.kind == "parameter")),
        written_buffers=tuple(op for op in stored if op in dag.written),
        constants=tuple(op for op in stored if op not in dag.written),
        inputs=inputs,
        outputs=tuple(edge for edge in edges if edge.source == index),
        has_loss=dag.loss.id in inside,
        postponed=postponed(
            dag, body, (edge.value for edge in inputs if edge.kind == "activation" and edge.gradient), gradients
        ),
    )
