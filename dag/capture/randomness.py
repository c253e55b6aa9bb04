"""Which operators really draw random numbers, given their arguments."""

from __future__ import annotations

from typing import Any

import torch

from dag.allowlist import GETITEM
from dag.capture.draft import Draft
from dag.graph import Op
from dag.operators import resolve

_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


def draws(draft: Draft) -> bool:
    """Whether the call draws random numbers: dropout only in training with p > 0, recurrent layers only with dropout."""
    if draft.kind != "call" or draft.target == GETITEM:
        return False
    overload: Any = resolve(draft.target)
    if torch.Tag.nondeterministic_seeded not in overload.tags:
        return False
    packet = draft.target.split(".")[1].removesuffix("_")
    given = arguments(draft)
    if packet in _RECURRENT:
        return bool(given["train"]) and given["dropout"] > 0 and given["num_layers"] > 1
    if "dropout" in packet:
        return bool(given["train"] is not False and given["p"] != 0)
    if packet == "scaled_dot_product_attention":
        return bool(given["dropout_p"] != 0)
    if packet.startswith("rrelu"):
        return given["training"] is True
    return True


def arguments(call: Draft | Op) -> dict[str, Any]:
    """The call's arguments by the names in the operator's schema, defaults filled in."""
    overload: Any = resolve(call.target)
    named = dict(call.kwargs)
    found: dict[str, Any] = {}
    for position, argument in enumerate(overload._schema.arguments):
        if position < len(call.args):
            found[argument.name] = call.args[position]
        else:
            found[argument.name] = named.get(argument.name, argument.default_value)
    return found
