"""Joins what evaluation does differently into an OP-DAG, where a branch on `self.training` makes more than flags of it.

Stochastic depth multiplies by a mask in training and by nothing in evaluation; a variational model adds noise to its mean; a
codebook moves. The two traces are alike but for such places. So their calls are matched in order, by operator, module,
plain arguments and shapes, and what remains belongs to one of the two alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from dag.allowlist import GETITEM
from dag.capture.alignment import aligned
from dag.capture.randomness import arguments
from dag.evaluation import evaluation_form
from dag.graph import Arg, Named, Op, OpDag, Ref, Rewired, refs_of

_CALLS = ("call", "loss")
_Call = tuple[tuple[Arg, ...], tuple[tuple[str, Arg], ...]]


def joined(training: OpDag, evaluation: OpDag, constants: Mapping[str, str]) -> OpDag | None:
    """`training` with what `evaluation`, the same model's trace after `eval()`, does differently.

    `constants` maps the constants of `evaluation` to what they are called in the result, the same one in `training` where there
    is one. None where the two don't go together: evaluation reads a parameter that nobody trains, or writes what training has.
    """
    by_flags = {op.id: form for op in training.ops if (form := evaluation_form(op, training)) is not None}
    wanted = [
        replace(form, target=constants[form.target]) if form.kind == "constant" else form
        for op in evaluation.ops
        if (form := evaluation_form(op, evaluation)) is not None
    ]
    same = _matched(training, by_flags, wanted)
    alone = [form for form in wanted if form.id not in same]
    made = {form.id for form in alone if form.kind == "call"}
    if any(form.kind in ("parameter", "loss") or not made.issuperset(form.mutates) for form in alone):
        return None

    order = _order(training, wanted, same)
    ours = {op: place for place, (mine, op) in enumerate(order) if mine}
    theirs = {op: place for place, (mine, op) in enumerate(order) if not mine}
    theirs |= {op: ours[match] for op, match in same.items()}
    rewired = []
    for form in wanted:
        usual = by_flags[same[form.id]] if form.id in same and form.kind in _CALLS else None
        if usual is not None and _sources(form, theirs) != _sources(usual, ours):
            rewired.append(Rewired(theirs[form.id], *_renumbered(form, theirs)))

    shared = set(same.values())
    left = {op.id for op in training.ops if op.kind == "call" and op.id not in shared}
    if not rewired and not alone and left.isdisjoint(by_flags):
        return training
    names = {op.name for op in training.ops}
    forms = {form.id: form for form in alone}
    ops = []
    for place, (mine, op) in enumerate(order):
        if mine:
            moved = _moved(training.ops[op], place, ours)
            ops.append(replace(moved, only_in="training") if op in left else moved)
        else:
            ops.append(_for_evaluation_alone(_moved(forms[op], place, theirs), names))
    added = {form.target for form in alone if form.kind == "buffer"}
    return replace(
        training,
        ops=tuple(ops),
        parameters=tuple(replace(parameter, op=ours[parameter.op]) for parameter in training.parameters),
        persistent_buffers=(
            *training.persistent_buffers,
            *(name for name in evaluation.persistent_buffers if name in added),
        ),
        buffer_aliases=(*training.buffer_aliases, *(item for item in evaluation.buffer_aliases if item[0] in added)),
        rewired=tuple(rewired),
    )


def _matched(training: OpDag, by_flags: Mapping[int, Op], wanted: Iterable[Op]) -> dict[int, int]:
    """Op of the evaluation -> the one of `training` whose place it takes."""
    leaves = {(op.kind, op.target, op.outputs): op.id for op in training.ops if op.kind not in _CALLS}
    same = {
        form.id: leaves[key]
        for form in wanted
        if form.kind not in _CALLS and (key := (form.kind, form.target, form.outputs)) in leaves
    }
    ours = [form for form in by_flags.values() if form.kind in _CALLS]
    theirs = [form for form in wanted if form.kind in _CALLS]
    keys = [_key(op) for op in ours]
    pairs = aligned(keys, [_key(op) for op in theirs])
    free = 0
    for (position, place), (following, _) in pairwise((*pairs, (len(ours), len(theirs)))):
        # Of several that are alike, the one that reads the same.
        choice = (at for at in range(free, following) if keys[at] == keys[position])
        other = theirs[place]
        found = next((at for at in choice if _reads_alike(ours[at], other, same)), position)
        same[other.id], free = ours[found].id, found + 1
    calls = {form.id for form in theirs}
    before = 0
    while len(same) != before:
        before = len(same)
        for form in theirs:
            mine = same.get(form.id)
            if mine is not None and not _fits(by_flags[mine], form, same, constant=mine in training.constant):
                del same[form.id]
            if form.id not in same:
                # What it writes is not what training has.
                for written in calls.intersection(form.mutates):
                    same.pop(written, None)
    return same


def _fits(mine: Op, other: Op, same: Mapping[int, int], *, constant: bool) -> bool:
    """Whether one op can be both: a constant is computed once, and a write in evaluation must be one that cuts allow for."""
    if constant:
        return _reads_alike(mine, other, same)
    return all(written in same and same[written] in mine.mutates for written in other.mutates)


def _reads_alike(mine: Op, other: Op, same: Mapping[int, int]) -> bool:
    return all(source in same for source in other.inputs()) and _sources(other, same) == _sources(
        mine, {source: source for source in mine.inputs()}
    )


def _order(training: OpDag, wanted: Iterable[Op], same: Mapping[int, int]) -> list[tuple[bool, int]]:
    """(whether it is of `training`, op): what is evaluation's alone stands behind the call that it comes after there."""
    last = max((op.id for op in training.ops if op.kind not in _CALLS), default=-1)
    behind: dict[int, list[int]] = {}
    for form in wanted:
        if form.id in same:
            last = same[form.id] if form.kind in _CALLS else last
        else:
            behind.setdefault(last if form.kind in _CALLS else -1, []).append(form.id)
    order = [(False, op) for op in behind.get(-1, ())]
    for op in training.ops:
        order.append((True, op.id))
        order.extend((False, other) for other in behind.get(op.id, ()))
    return order


def _for_evaluation_alone(op: Op, names: set[str]) -> Op:
    name = f"{op.name}_in_evaluation"
    while name in names:
        name += "_"
    names.add(name)
    op = replace(op, name=name, requires_grad=False, flops=0, backward_flops=0, saved_bytes=0)
    return replace(op, only_in="evaluation") if op.kind == "call" else op


def _moved(op: Op, place: int, places: Mapping[int, int]) -> Op:
    args, kwargs = _renumbered(op, places)
    mutates, aliases = (tuple(places[other] for other in others) for others in (op.mutates, op.aliases))
    return replace(op, id=place, args=args, kwargs=kwargs, mutates=mutates, aliases=aliases)


def _renumbered(op: Op, places: Mapping[int, int]) -> _Call:
    def arg_of(arg: Arg) -> Arg:
        if isinstance(arg, Ref):
            return Ref(places[arg.op])
        return tuple(arg_of(item) for item in arg) if isinstance(arg, tuple) else arg

    return tuple(arg_of(arg) for arg in op.args), tuple((name, arg_of(arg)) for name, arg in op.kwargs)


def _key(op: Op) -> tuple[Any, ...]:
    return (op.target, op.module, op.outputs, tuple(_plain(value) for value in _given(op)))


def _given(op: Op) -> list[Any]:
    """All arguments, whether they were written out or left to the operator."""
    return [*arguments(op).values()] if op.kind == "call" and op.target != GETITEM else [*op.args]


def _plain(arg: Any) -> Any:
    """An argument without what it refers to; 1, 1.0 and True are three things."""
    if isinstance(arg, Ref):
        return Ref
    if isinstance(arg, tuple | list):
        return tuple(_plain(item) for item in arg)
    return (arg,) if isinstance(arg, Named) else (type(arg), str(arg))


def _sources(op: Op, places: Mapping[int, int]) -> list[int]:
    """What it reads, in the order of the operator's arguments."""
    return [places[ref] for arg in _given(op) for ref in refs_of(arg)]
