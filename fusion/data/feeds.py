"""Which placeholder of the model reads which array: `inputs` and `targets`, or the names of forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fusion.data.prepared import RawData
from fusion.errors import DataError
from fusion.yaml_file import suggest


def feeds_for(raw: RawData, forward: Callable[..., Any], loss_is_the_models: bool) -> dict[str, str]:
    """Placeholder -> array of the blob, or `inputs`/`targets` of tokens. Raises `DataError` with what does not match.

    A model in the manner of `transformers` that returns its own loss takes `input_ids` and `labels`, both unshifted:
    such a model shifts the labels itself.
    """
    parameters = _named_parameters(forward)
    if raw.kind == "tokens":
        if not loss_is_the_models:
            return {"inputs": "inputs", "targets": "targets"}
        if {"input_ids", "labels"} <= parameters.keys():
            return {"input_ids": "inputs", "labels": "inputs"}
        if "targets" in parameters:
            return {"inputs": "inputs", "targets": "targets"}
        raise DataError(
            f"{raw.where}: with loss: model the model's forward takes `input_ids` and `labels`, or its input and "
            f"`targets`; this one takes {', '.join(parameters) or 'nothing'}"
        )
    keys = list(raw.tensors)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(forward))
    for key in keys:
        if key in ("inputs", "targets") or key in parameters or takes_any:
            continue
        known = ["inputs", "targets", *parameters]
        raise DataError(f"{raw.where}: the model's forward takes no argument {key!r}{suggest(key, known)}")
    if not loss_is_the_models and "targets" not in keys:
        raise DataError(
            f"{raw.where}: no key `targets` for the loss (keys: {', '.join(keys)}); add it, or use loss: model"
        )
    if "inputs" in keys:
        return {key: key for key in keys}
    missing = [
        name for name, parameter in parameters.items() if parameter.default is parameter.empty and name not in keys
    ]
    if missing or not any(key != "targets" for key in keys):
        raise DataError(
            f"{raw.where}: no key {missing[0] if missing else 'inputs'!r} for the model's forward (keys: "
            f"{', '.join(keys)}); call it `inputs`, or give one array for each argument"
        )
    return {key: key for key in keys}


def _parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return []


def _named_parameters(forward: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter for parameter in _parameters(forward) if parameter.kind in kinds}
