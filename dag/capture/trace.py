"""From a model in one mode to ops: `torch.export`, then data, with what tensors without data show of each op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import nn

from dag.capture.autocast import explicit_casts
from dag.capture.carried import notes_on, refuse_carried, unchanged_random_state
from dag.capture.draft import Draft, number
from dag.capture.export import casting, export
from dag.capture.inline import inline
from dag.capture.names import Names
from dag.capture.objective import Loss, Objective
from dag.capture.randomness import draws
from dag.capture.tidy import outputs_next_to_producers, without_dead_code
from dag.capture.writes import make_functional, refuse_lost_writes, with_sharing
from dag.graph import Op, TensorMeta
from dag.operators import meta_of
from dag.propagate import Observation, OpError, observe, with_observations
from fusion.errors import CaptureError


@dataclass(frozen=True)
class Trace:
    """The ops of one mode, numbered, with the drafts that they were made from and what was seen of them."""

    ops: tuple[Op, ...]
    drafts: Sequence[Draft]
    observations: Sequence[Observation]
    names: Names
    notes: tuple[str, ...]


def trace(
    model: nn.Module,
    loss: Loss,
    example: Mapping[str, torch.Tensor],
    autocast: str | None,
    mode: Callable[[Objective], AbstractContextManager[None]],
) -> Trace:
    """The ops of `model` and `loss` within `mode` (`dag.capture.modes`). Raises `CaptureError`."""
    objective = Objective(model, loss)
    with mode(objective), unchanged_random_state(objective, example):
        program, changed = export(objective, example, autocast)
    drafts, result = inline(program, tuple(example), autocast)
    drafts.append(Draft("loss", "loss", "loss", (result,)))
    names = Names(model, objective, program)
    drafts = names.apply(drafts)
    leaves = {draft: meta for draft in drafts if (meta := _leaf_meta(draft, names, example)) is not None}
    drafts = outputs_next_to_producers(explicit_casts(drafts, leaves))
    drafts, observations = _simplified(drafts, names, example)
    with mode(objective), casting(autocast):
        untried = refuse_carried(objective, example, changed)
    ops = _finished(drafts, observations)
    return Trace(tuple(ops), drafts, observations, names, (*notes_on(changed), *untried))


def _simplified(
    drafts: list[Draft], names: Names, example: Mapping[str, torch.Tensor]
) -> tuple[list[Draft], list[Observation]]:
    """Functional where that is exact, without dead code; with what a last run on tensors without data showed."""

    def observed(drafts: list[Draft], *, costs: bool) -> list[Observation]:
        leaves = {
            position: meta
            for position, draft in enumerate(drafts)
            if (meta := _leaf_meta(draft, names, example)) is not None
        }
        try:
            return observe(number(drafts), leaves, costs=costs)
        except OpError as error:
            where = drafts[error.op].where
            raise CaptureError(f"{where + ': ' if where else ''}this model can't be captured: {error}") from error

    first = dict(zip(drafts, observed(drafts, costs=False), strict=True))
    refuse_lost_writes(drafts, list(first.values()), names.is_buffer_of_loss)
    drafts = without_dead_code(drafts, list(first.values()), drafts[-1])
    drafts = make_functional(drafts, [first[draft] for draft in drafts])
    observations = observed(drafts, costs=True)
    # A write that nobody reads is dead only now that it is functional.
    kept = without_dead_code(drafts, observations, drafts[-1])
    return kept, observations if len(kept) == len(drafts) else observed(kept, costs=True)


def _leaf_meta(draft: Draft, names: Names, example: Mapping[str, torch.Tensor]) -> TensorMeta | None:
    if draft.kind in ("call", "loss"):
        return None
    return meta_of(example[draft.target] if draft.kind == "placeholder" else names.tensor(draft))


def _finished(drafts: list[Draft], observations: list[Observation]) -> list[Op]:
    ops = with_sharing(with_observations(number(drafts), observations), drafts, observations)
    return [replace(op, random=draws(draft)) for op, draft in zip(ops, drafts, strict=True)]
