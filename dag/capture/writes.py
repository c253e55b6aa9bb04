"""In-place writes: who writes what, which writes become functional, and which must stay with all that share the storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from dag.allowlist import ALLOWED, GETITEM
from dag.capture.draft import Draft, final, number, replace_everywhere
from dag.capture.randomness import arguments, draws
from dag.graph import Op
from dag.operators import resolve
from dag.propagate import Observation, OpError, observe
from fusion.errors import CaptureError

_DERIVED_FROM_RESULTS = frozenset({"elu_", "selu_", "celu_"})
"""Calls whose derivative is computed from the result, and that of their functional twin from the argument: it rounds otherwise."""

_RUNNING_STATISTICS = {"aten.batch_norm.default": "training", "aten.instance_norm.default": "use_input_stats"}


def written_by(draft: Draft) -> tuple[Draft, ...]:
    """The arguments that a call writes in place.

    The schemas of batch and instance norm don't say that they update their running statistics.
    """
    if draft.kind != "call" or draft.target == GETITEM:
        return ()
    if draft.target in _RUNNING_STATISTICS:
        given = arguments(draft)
        if not given[_RUNNING_STATISTICS[draft.target]]:
            return ()
        return tuple(given[name] for name in ("running_mean", "running_var") if given[name] is not None)
    overload: Any = resolve(draft.target)
    given = arguments(draft)
    return tuple(
        given[argument.name]
        for argument in overload._schema.arguments
        if argument.is_write and isinstance(given[argument.name], Draft)
    )


def refuse_lost_writes(
    drafts: Sequence[Draft], observations: Sequence[Observation], is_buffer_of_loss: Callable[[Draft], bool]
) -> None:
    """Raise `CaptureError` for a write to a parameter or to a tensor that is no buffer of the model: it would not last."""
    sharing = _Sharing(drafts, observations)
    for position, draft in enumerate(drafts):
        for value in written_by(draft):
            for member in sharing.members(value, position):
                place = f"{draft.where}: " if draft.where else ""
                if member.kind == "parameter":
                    raise CaptureError(
                        f"{place}forward writes the parameter {member.target} in place ({draft.target}); only the "
                        "optimiser may change parameters, compute a new tensor instead"
                    )
                if is_buffer_of_loss(member):
                    name = member.target.rpartition(".")[2]
                    raise CaptureError(
                        f"{place}the loss writes its buffer {name} in place ({draft.target}); a loss can't keep state, "
                        "move the buffer and what updates it into the model"
                    )
                if member.kind == "constant":
                    raise CaptureError(
                        f"{place}forward writes a tensor that is no buffer in place ({draft.target}); register it with "
                        "register_buffer, and don't write through .data"
                    )


def make_functional(drafts: list[Draft], observations: Sequence[Observation]) -> list[Draft]:
    """Turn in-place calls into their functional twins wherever nothing else can see the write.

    `observations` belong to `drafts`. Calls that stay in place are those that write a buffer, or a storage that another
    value shares and somebody reads later. Input data that is written is copied first.
    """
    sharing = _Sharing(drafts, observations)
    last_read = {source: position for position, draft in enumerate(drafts) for source in draft.inputs()}
    result: list[Draft] = []
    replacements: dict[Draft, Draft] = {}
    copies: dict[Draft, Draft] = {}
    for position, draft in enumerate(drafts):
        replace_everywhere([draft], replacements)
        for value in written_by(draft):
            for member in sharing.members(value, position):
                if member.kind == "placeholder" and member not in copies:
                    copies[member] = Draft(f"{member.name}_copy", "call", "aten.clone.default", (member,))
        # Earlier results of writes to the same tensor are the same value; other sharers are views that see the write.
        views = [
            member
            for value in written_by(draft)[:1]
            for member in sharing.members(value, position)
            if final(member, replacements) is not value
        ]
        if not any(last_read.get(view, -1) > position for view in views) and _turn_functional(
            draft, position, sharing, observations
        ):
            value = draft.args[0]
            # From here on, whoever reads the written value reads the result.
            replacements[value] = draft
            last_read[draft] = max(last_read.get(draft, position), last_read.get(value, position))
        result.append(draft)
    return _with_copies(result, copies)


def _with_copies(drafts: list[Draft], copies: dict[Draft, Draft]) -> list[Draft]:
    if not copies:
        return drafts
    replace_everywhere(drafts, copies)
    result: list[Draft] = []
    for draft in drafts:
        result.append(draft)
        if draft in copies:
            result.append(copies[draft])
    return result


class _Sharing:
    """Which drafts share storage."""

    def __init__(self, drafts: Sequence[Draft], observations: Sequence[Observation]) -> None:
        self.seen = dict(zip(drafts, observations, strict=True))
        self._by_storage: dict[int, list[tuple[int, Draft]]] = {}
        for position, (draft, observation) in enumerate(self.seen.items()):
            for storage in observation.storages:
                self._by_storage.setdefault(storage, []).append((position, draft))

    def members(self, draft: Draft, before: int) -> list[Draft]:
        """Drafts at positions under `before` that share storage with `draft`, itself included."""
        return [
            member
            for storage in self.seen[draft].storages
            for position, member in self._by_storage[storage]
            if position < before
        ]


def _turn_functional(
    draft: Draft,
    position: int,
    sharing: _Sharing,
    observations: Sequence[Observation],
) -> bool:
    """Rewrite `draft` to its functional twin if that is exact; tells whether it did."""
    written = written_by(draft)
    packet, overload = draft.target.split(".")[1:] if draft.target.startswith("aten.") else ("", "")
    functional = f"aten.{packet.removesuffix('_')}.{overload}"
    if len(written) != 1 or not packet.endswith("_") or functional not in ALLOWED or draft.args[:1] != written:
        return False
    value = written[0]
    if (draws(draft) and "dropout" not in packet) or packet in _DERIVED_FROM_RESULTS:
        return False
    if any(member.kind != "call" for member in sharing.members(value, position)):
        return False
    before, after = sharing.seen[value], observations[position]
    if not before.dense or (draft.no_grad and before.requires_grad):
        return False
    if not _same_arguments(draft.target, functional) or (after.requires_grad and not _differentiable(functional)):
        return False
    if not _gives_the_same(draft, functional, sharing, after):
        return False
    draft.target = functional
    return True


def _same_arguments(target: str, functional: str) -> bool:
    # The first one, what is written, goes by position and has several names.
    names = [[argument.name for argument in _schema(name).arguments[1:]] for name in (target, functional)]
    return names[0] == names[1]


def _schema(target: str) -> Any:
    overload: Any = resolve(target)
    return overload._schema


def _differentiable(target: str) -> bool:
    overload: Any = resolve(target)
    keys = torch._C.DispatchKey
    return any(
        overload.has_kernel_for_dispatch_key(key)
        for key in (keys.AutogradCPU, keys.Autograd, keys.CompositeImplicitAutograd)
    )


def _gives_the_same(draft: Draft, functional: str, sharing: _Sharing, wanted: Observation) -> bool:
    """An in-place write keeps the shape and dtype of what it writes, and has a gradient; the functional twin may promote or
    broadcast, and that of `copy_` has none."""
    sources = list(dict.fromkeys(draft.inputs()))
    stand_ins = {
        source: Draft(f"input_{index}", "parameter" if sharing.seen[source].requires_grad else "constant", f"{index}")
        for index, source in enumerate(sources)
    }
    twin = Draft(draft.name, "call", functional, draft.args, dict(draft.kwargs))
    twin.substitute(stand_ins.__getitem__)
    ops = number([*stand_ins.values(), twin])
    metas = {position: sharing.seen[source].outputs[0] for position, source in enumerate(sources)}
    try:
        found = observe(ops, metas, costs=False)[-1]
        return found.outputs == wanted.outputs and found.differentiable
    except OpError:
        return False


def with_sharing(ops: Sequence[Op], drafts: Sequence[Draft], observations: Sequence[Observation]) -> list[Op]:
    """Fill in `mutates` (every earlier op that shares a written storage) and `aliases` (inputs whose storage an op shares)."""
    ids = {draft: position for position, draft in enumerate(drafts)}
    holders: dict[int, list[int]] = {}
    result: list[Op] = []
    for op, draft, seen in zip(ops, drafts, observations, strict=True):
        written = {
            holder
            for value in written_by(draft)
            for storage in observations[ids[value]].storages
            for holder in holders[storage]
        }
        aliases = tuple(source for source in op.inputs() if observations[source].storages & seen.storages)
        result.append(replace(op, mutates=tuple(sorted(written)), aliases=aliases))
        for storage in seen.storages:
            holders.setdefault(storage, []).append(op.id)
    return result
