"""What a model and its loss hold in Python (attributes that are no parameters or modules): compared, and put back."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dag.capture.objective import Objective

_INTERNAL = frozenset(nn.Module().__dict__)
# Lists of its parameters, which torch makes anew when these are swapped for tracing.
_RECURRENT = ("_flat_weights", "_flat_weight_refs")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OPAQUE = (torch.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, functools.partial)
# Attributes of attributes: a list of tuples in an object. What is deeper or longer is held by identity.
_DEPTH = 3
_LENGTH = 10_000


@dataclass(frozen=True)
class Attribute:
    """An attribute that a call of forward changed."""

    owner: object
    name: str
    path: str
    """As a person would write it: `layers.0.state` of the model, `center of the loss`."""
    in_loss: bool
    number: bool
    """Whether it is an int or float before and after."""


@dataclass(frozen=True, eq=False)
class _Seen:
    """A value, and what was in it."""

    value: Any
    inside: dict[Any, _Seen] | None = None
    state: Any = None
    """Of a generator of random numbers."""

    def same(self, other: _Seen) -> bool:
        if isinstance(self.value, _PLAIN):
            # 1 is neither True nor 1.0, and nan is nan.
            return type(self.value) is type(other.value) and (
                self.value == other.value or repr(self.value) == repr(other.value)
            )
        if self.value is not other.value and not (isinstance(self.value, tuple) and isinstance(other.value, tuple)):
            return False
        if self.inside is None or other.inside is None:
            return (self.inside is None) == (other.inside is None) and repr(self.state) == repr(other.state)
        return self.inside.keys() == other.inside.keys() and all(
            seen.same(other.inside[key]) for key, seen in self.inside.items()
        )

    def put_back(self) -> Any:
        """The value with the content that it had."""
        value = self.value
        if isinstance(value, random.Random):
            value.setstate(self.state)
        elif hasattr(value, "bit_generator"):
            value.bit_generator.state = self.state
        elif self.state is not None:
            value.set_state(self.state)
        if self.inside is None:
            return value
        inside = {key: seen.put_back() for key, seen in self.inside.items()}
        if isinstance(value, list):
            value[:] = inside.values()
        elif isinstance(value, deque):
            value.clear()
            value.extend(inside.values())
        elif not isinstance(value, tuple):
            content = value if isinstance(value, dict) else vars(value)
            content.clear()
            content.update(inside)
        return value


@dataclass
class PythonState:
    """What every module of an objective, and a loss that is an object, holds now."""

    objective: Objective
    _holders: list[tuple[object, str, bool, dict[str, Any]]] = field(init=False)
    _seen: list[dict[str, _Seen]] = field(init=False)

    def __post_init__(self) -> None:
        self._holders = list(_holders(self.objective))
        self._seen = [_content(content) for _, _, _, content in self._holders]

    def changes(self) -> list[Attribute]:
        """What is not any more as it was."""
        found = []
        for (owner, prefix, in_loss, content), before in zip(self._holders, self._seen, strict=True):
            after = _content(content)
            for name in dict.fromkeys((*before, *after)):
                if isinstance(owner, nn.RNNBase) and name in _RECURRENT:
                    continue
                old, new = before.get(name), after.get(name)
                if old is not None and new is not None and old.same(new):
                    continue
                number = all(
                    seen is not None and isinstance(seen.value, int | float) and not isinstance(seen.value, bool)
                    for seen in (old, new)
                )
                path = f"{name} of {prefix}" if in_loss else f"{prefix}{name}"
                found.append(Attribute(owner, name, path, in_loss, number))
        return found

    def put_back(self, only: Attribute | None = None) -> None:
        """Make everything, or one attribute, what it was."""
        for (owner, _, _, content), before in zip(self._holders, self._seen, strict=True):
            now = _content(content)
            for name in (*now, *(name for name in before if name not in now)):
                if only is not None and (only.owner is not owner or only.name != name):
                    continue
                if name not in before:
                    del content[name]
                elif name not in now or not before[name].same(now[name]):
                    content[name] = before[name].put_back()


def _holders(objective: Objective) -> Iterator[tuple[object, str, bool, dict[str, Any]]]:
    """Owner, how its attributes are called, whether it is the loss's, and the dict that has them."""
    for full, module in objective.named_modules():
        if module is objective:
            continue
        part, _, name = full.partition(".")
        in_loss = part == "loss"
        prefix = (f"{name} in the loss" if name else "the loss") if in_loss else f"{name}.".removeprefix(".")
        yield module, prefix, in_loss, module.__dict__
    loss = getattr(objective.loss, "__self__", objective.loss)
    if not isinstance(loss, (str, *_OPAQUE)) and hasattr(loss, "__dict__"):
        yield loss, "the loss", True, loss.__dict__


def _content(content: Mapping[str, Any]) -> dict[str, _Seen]:
    return {name: _look(value, _DEPTH) for name, value in content.items() if name not in _INTERNAL}


def _look(value: Any, depth: int) -> _Seen:
    if isinstance(value, (*_PLAIN, *_OPAQUE)):
        return _Seen(value)
    if isinstance(value, random.Random):
        return _Seen(value, state=value.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return _Seen(value, state=value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return _Seen(value, state=value.get_state())
    inside = _inside(value) if depth else None
    if inside is None or len(inside) > _LENGTH:
        return _Seen(value)
    return _Seen(value, {key: _look(item, depth - 1) for key, item in inside.items()})


def _inside(value: Any) -> dict[Any, Any] | None:
    if isinstance(value, list | tuple | deque):
        return dict(enumerate(value))
    if isinstance(value, dict):
        return dict(value)
    if type(value).__module__.partition(".")[0] in ("torch", "numpy", "builtins"):
        return None
    content = getattr(value, "__dict__", None)
    return dict(content) if isinstance(content, dict) else None
