"""Captures a model and its loss as an OP-DAG: `torch.export` in training mode, then plain data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dag.autocast import explicit_casts
from dag.carried import notes_on, refuse_carried, unchanged_random_state
from dag.custom_gradients import check_hooks
from dag.cut import differentiated
from dag.draft import Draft, number
from dag.experts import dense_experts
from dag.export import casting, export
from dag.graph import Op, OpDag, TensorMeta
from dag.inline import inline
from dag.names import Names
from dag.objective import Loss, Objective, check_example
from dag.operators import meta_of
from dag.propagate import Observation, OpError, observe, with_observations
from dag.randomness import draws
from dag.tidy import outputs_next_to_producers, without_dead_code
from dag.unregistered import notes_on_unregistered
from dag.validate import validate
from dag.writes import make_functional, refuse_lost_writes, with_sharing
from fusion.errors import CaptureError, DagError

AUTOCAST_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Captured:
    """An OP-DAG and the tensors of its parameters, buffers and constants."""

    dag: OpDag
    tensors: dict[str, torch.Tensor]
    """Every tensor of `model.state_dict()` under its key (tied ones under each of their keys, as the same tensor), the
    non-persistent buffers that the DAG reads, and the constants under `constant/NAME`. Detached, not copied."""


def capture(
    model: nn.Module,
    example: Mapping[str, torch.Tensor],
    loss: Loss,
    *,
    name: str = "model",
    autocast: str | None = None,
) -> Captured:
    """Capture `model` and `loss` on one micro-batch.

    `example` maps data keys to tensors of a micro-batch's shape: `inputs` goes to `forward` first, `targets` to the loss,
    any other key by name. `loss` is `cross_entropy`, `mse`, `model` when forward returns the loss, or a function of
    (output, targets). `autocast` (`bfloat16`) traces model and loss under mixed precision; its casts become ops.

    A model in evaluation mode is captured in training mode. Parameters without `requires_grad` are captured as buffers.
    Raises `CaptureError` with the user's file and line.
    """
    check_example(model, example, loss)
    if autocast is not None and autocast not in AUTOCAST_DTYPES:
        raise CaptureError(f"autocast {autocast!r} is not known; use {' or '.join(AUTOCAST_DTYPES)}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise CaptureError(f"no parameter of {type(model).__name__} requires a gradient; there is nothing to train")
    check_hooks(model)
    with ready_for_training(model):
        objective = Objective(model, loss)
        with unchanged_random_state(objective, example):
            program, changed = export(objective, example, autocast)
    drafts, result = inline(program, tuple(example), autocast)
    drafts.append(Draft("loss", "loss", "loss", (result,)))
    names = Names(model, objective, program)
    drafts = names.apply(drafts)
    leaves = {draft: meta for draft in drafts if (meta := _leaf_meta(draft, names, example)) is not None}
    drafts = outputs_next_to_producers(explicit_casts(drafts, leaves))
    drafts, observations = _simplified(drafts, names, example)
    with ready_for_training(model), casting(autocast):
        untried = refuse_carried(objective, example, changed)
    ops = _finished(drafts, observations)
    dag = OpDag(
        ops=tuple(ops),
        parameters=names.parameters(ops),
        persistent_buffers=names.persistent_buffers(ops),
        name=name,
        autocast=autocast,
        notes=(
            *_notes(ops),
            *notes_on(changed),
            *untried,
            *notes_on_unregistered(model, names.constants(ops)),
        ),
        buffer_aliases=names.buffer_aliases(ops),
    )
    if not dag.loss.requires_grad:
        raise CaptureError(
            "the loss does not depend on any parameter that requires a gradient; nothing would be trained"
        )
    _refuse_without_derivative(dag, drafts, observations)
    try:
        validate(dag)
    except DagError as error:
        raise CaptureError(f"this model can't be captured: {error}") from error
    return Captured(dag, names.tensors(ops))


@contextlib.contextmanager
def ready_for_training(model: nn.Module) -> Iterator[None]:
    """In training mode, and, for transformers, with dense experts and without the cache that only generation needs."""
    was_training = model.training
    config: Any = getattr(model, "config", None)
    caching = getattr(config, "use_cache", None) is True
    if not was_training:
        model.train()
    if caching:
        config.use_cache = False
    try:
        with dense_experts(model):
            yield
    finally:
        if not was_training:
            model.eval()
        if caching:
            config.use_cache = True


def _refuse_without_derivative(dag: OpDag, drafts: Sequence[Draft], observations: Sequence[Observation]) -> None:
    """Raise `CaptureError` where a gradient would have to go back through an operator that torch has no derivative of."""
    wanting = differentiated(dag)
    for op, draft, seen in zip(dag.ops, drafts, observations, strict=True):
        if op.id in wanting and not seen.differentiable:
            place = f"{draft.where}: " if draft.where else ""
            raise CaptureError(
                f"{place}torch has no derivative of {op.target}, and the loss depends on parameters through it; compute its "
                "argument under torch.no_grad() or detach() it, or use another operator"
            )


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


def _notes(ops: list[Op]) -> list[str]:
    unusual = {"float64"} & {meta.dtype for op in ops for meta in op.outputs}
    return [f"some values are of dtype {dtype}, which is slow on most devices" for dtype in sorted(unusual)]


__all__ = ["AUTOCAST_DTYPES", "Captured", "capture", "ready_for_training"]
