"""Names of parameters, buffers and constants: the model's own state-dict keys, one canonical name for tied tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.export import ExportedProgram

from dag.capture.draft import Draft, replace_everywhere
from dag.capture.objective import Objective
from dag.graph import Op, Parameter
from fusion.errors import CaptureError

MODEL_PREFIX = "model."
CONSTANT_PREFIX = "constant/"


class Names:
    """Knows every tensor of the model by identity, and gives the traced leaves their names."""

    def __init__(self, model: nn.Module, objective: Objective, program: ExportedProgram) -> None:
        self._state = {
            key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)
        }
        self._order = {id(parameter): position for position, parameter in enumerate(model.parameters())}
        self._keys: dict[int, list[str]] = {}
        """Names of each tensor, the canonical one first."""
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            self._keys.setdefault(id(tensor), []).append(name)
        self._held = {
            **dict(objective.named_parameters(remove_duplicate=False)),
            **dict(objective.named_buffers(remove_duplicate=False)),
        }
        self._constants = dict(program.constants)
        self._tensors: dict[tuple[str, str], torch.Tensor] = {}
        """By kind and target of the named leaf."""

    def apply(self, drafts: list[Draft]) -> list[Draft]:
        """Rename the leaves, merge those that are the same tensor, and make frozen parameters buffers."""
        kept: dict[tuple[str, str], Draft] = {}
        merged: dict[Draft, Draft] = {}
        result: list[Draft] = []
        for draft in drafts:
            if draft.kind in ("parameter", "buffer", "constant"):
                tensor = self._tensor_of(draft)
                self._name(draft, tensor)
                key = (draft.kind, draft.target)
                if key in kept:
                    merged[draft] = kept[key]
                    continue
                kept[key] = draft
                self._tensors[key] = tensor.detach()
            result.append(draft)
        replace_everywhere(result, merged)
        return result

    def tensor(self, draft: Draft) -> torch.Tensor:
        """The value of a named leaf."""
        return self._tensors[(draft.kind, draft.target)]

    def _tensor_of(self, draft: Draft) -> torch.Tensor:
        held = self._held.get(draft.target)
        if held is None:
            held = self._constants.get(draft.target)
        if not isinstance(held, torch.Tensor):
            raise CaptureError(f"the model holds {draft.target}, which is not a tensor and can't be captured")
        return held

    def _name(self, draft: Draft, tensor: torch.Tensor) -> None:
        keys = self._keys.get(id(tensor))
        if keys is None:
            if tensor.requires_grad:
                raise CaptureError(
                    f"{draft.target} requires a gradient but is no parameter of the model; "
                    "move it into the model as a torch.nn.Parameter"
                )
            draft.kind = "constant"
            draft.target = CONSTANT_PREFIX + draft.target.removeprefix(MODEL_PREFIX)
            return
        draft.target = keys[0]
        draft.kind = "parameter" if tensor.requires_grad else "buffer"
        if draft.kind == "parameter" and keys[0] not in self._state:
            raise CaptureError(
                f"parameter {keys[0]} is not in the model's state_dict (a state-dict hook renames it?); "
                "checkpoints could not be loaded"
            )

    def is_buffer_of_loss(self, draft: Draft) -> bool:
        """Whether a named leaf is a buffer that the loss module registered."""
        return draft.kind == "constant" and draft.target.removeprefix(CONSTANT_PREFIX) in self._held

    def parameters(self, ops: Sequence[Op]) -> tuple[Parameter, ...]:
        """The parameters of the DAG, in the order of `model.parameters()`."""
        found = []
        for op in ops:
            if op.kind == "parameter":
                tensor = self._state[op.target]
                found.append(Parameter(op.id, op.target, tuple(self._keys[id(tensor)][1:]), self._order[id(tensor)]))
        return tuple(sorted(found, key=lambda parameter: parameter.order))

    def constants(self, ops: Sequence[Op]) -> list[torch.Tensor]:
        """What the DAG reads and is neither a parameter nor a buffer of the model."""
        return [self._tensors[(op.kind, op.target)] for op in ops if op.kind == "constant"]

    def persistent_buffers(self, ops: Sequence[Op]) -> tuple[str, ...]:
        """Buffer ops (frozen parameters among them) that are in the state dict."""
        return tuple(op.target for op in ops if op.kind == "buffer" and op.target in self._state)

    def buffer_aliases(self, ops: Sequence[Op]) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Persistent buffers with more than one state-dict key."""
        found = []
        for name in self.persistent_buffers(ops):
            aliases = tuple(key for key in self._keys[id(self._state[name])][1:] if key in self._state)
            if aliases:
                found.append((name, aliases))
        return tuple(found)

    def tensors(self, ops: Sequence[Op]) -> dict[str, torch.Tensor]:
        """The weights blob: the whole state dict, non-persistent buffers that the DAG reads, and constants."""
        found = {key: value.detach() for key, value in self._state.items()}
        for op in ops:
            if op.kind in ("buffer", "constant"):
                found.setdefault(op.target, self._tensors[(op.kind, op.target)])
        return found
