"""Order and dead code: outputs right after their producer, nothing that neither the loss nor a buffer needs."""

from __future__ import annotations

from collections.abc import Sequence

from dag.allowlist import GETITEM
from dag.capture.draft import Draft
from dag.capture.writes import written_by
from dag.propagate import Observation


def outputs_next_to_producers(drafts: Sequence[Draft]) -> list[Draft]:
    """Move every `py.getitem` right behind the call whose output it takes."""
    items: dict[Draft, list[Draft]] = {}
    for draft in drafts:
        if draft.target == GETITEM:
            items.setdefault(draft.args[0], []).append(draft)
    result: list[Draft] = []
    for draft in drafts:
        if draft.target != GETITEM:
            result.append(draft)
            result.extend(items.get(draft, ()))
    return result


def without_dead_code(drafts: Sequence[Draft], observations: Sequence[Observation], loss: Draft) -> list[Draft]:
    """Keep what the loss needs, and writes to buffers or to storage that something kept reads."""
    storages = {draft: seen.storages for draft, seen in zip(drafts, observations, strict=True)}
    needed: set[Draft] = set()
    live: set[int] = set()
    for draft in drafts:
        if draft.kind == "buffer":
            live |= storages[draft]
    pending = [loss]
    while pending:
        for draft in _closure(pending, needed):
            live |= storages[draft]
        # A write counts once something that is kept may see it.
        pending = [
            draft
            for draft in drafts
            if draft not in needed and any(storages[value] & live for value in written_by(draft))
        ]
    return [draft for draft in drafts if draft in needed]


def _closure(roots: list[Draft], needed: set[Draft]) -> list[Draft]:
    """Add `roots` and all they read to `needed`; gives what was new."""
    new: list[Draft] = []
    pending = list(roots)
    while pending:
        draft = pending.pop()
        if draft in needed:
            continue
        needed.add(draft)
        new.append(draft)
        pending.extend(draft.inputs())
    return new
