"""Refuses what a call of forward leaves in Python for the next one: workers run the OP-DAG, and would not see it.

Much that forward assigns is read by nobody or always the same (attention weights kept to look at, a mask made once), so the
question is put to the model itself: is the loss of a micro-batch another one after a call with other data?
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from dag.capture.blame import is_users, line_of_attribute, line_of_function
from dag.capture.objective import Objective
from dag.capture.python_state import Attribute, PythonState
from dag.quiet import quiet
from fusion.errors import CaptureError


def refuse_carried(objective: Objective, example: Mapping[str, Tensor], changed: Sequence[Attribute]) -> list[str]:
    """Raise `CaptureError` when what forward changes among Python's attributes changes its next loss.

    `changed` is what tracing saw. A model without numbers is not asked. Returns what a person should know: that the model,
    which could be traced, fails on these numbers, so that it could not be asked.
    """
    tensors = (*objective.parameters(), *objective.buffers(), *example.values())
    if not changed or any(tensor.is_meta for tensor in tensors):
        return []
    calls = _Calls(objective, example)
    try:
        carried = calls.carried()
    except Exception as error:
        # A job is tried on its first micro-batch next, which says where it fails.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return [f"forward changes {changed[0].path}; whether its next call depends on it can't be tried: {reason}"]
    finally:
        calls.put_back()
    if carried is not None:
        raise _refusal(carried)
    return []


def _refusal(attribute: Attribute) -> CaptureError:
    place = line_of_attribute(attribute.owner, attribute.name)
    place = place or line_of_function(getattr(type(attribute.owner), "forward", None))
    prefix = f"{place}: " if place else ""
    if attribute.in_loss:
        return CaptureError(
            f"{prefix}the loss changes {attribute.path}, and its next call depends on it; a loss can't keep state, move "
            "it into the model as a buffer (register_buffer) and write that in place"
        )
    if attribute.number:
        return CaptureError(
            f"{prefix}forward changes {attribute.path}, and its next call depends on it; a Python number is taken once, "
            "at capture, keep it as a tensor: a buffer (register_buffer) that is written in place"
        )
    return CaptureError(
        f"{prefix}forward changes {attribute.path}, and its next call depends on it; keep such state in a buffer: give it "
        "its shape with register_buffer in __init__, and write it in place"
    )


class _Calls:
    """Calls of an objective on real numbers, from a state that is known."""

    def __init__(self, objective: Objective, example: Mapping[str, Tensor]) -> None:
        self._objective = objective
        self._device = next((tensor.device for tensor in objective.parameters()), torch.device("cpu"))
        self._example = {key: value.detach().to(self._device) for key, value in example.items()}
        self._before = PythonState(objective)
        frozen = (parameter for parameter in objective.parameters() if not parameter.requires_grad)
        self._written = [(tensor, tensor.detach().clone()) for tensor in (*objective.buffers(), *frozen)]

    def carried(self) -> Attribute | None:
        """An attribute through which a call changes the loss of the next one."""
        expected = self.loss()
        self.put_back()
        try:
            self.loss({key: _other(value) for key, value in self._example.items()})
        except Exception:
            # It does not like such data.
            self.put_back()
            self.loss()
        after = PythonState(self._objective)
        changed = self._before.changes()
        self._put_tensors_back()
        if _same(self.loss(), expected):
            return None
        for attribute in changed:
            self.put_back()
            after.put_back(attribute)
            if not _same(self.loss(), expected):
                return attribute
        return next((attribute for attribute in changed if not attribute.number), changed[0])

    def put_back(self) -> None:
        self._before.put_back()
        self._put_tensors_back()

    def _put_tensors_back(self) -> None:
        with torch.no_grad():
            for tensor, value in self._written:
                tensor.copy_(value)

    def loss(self, other: Mapping[str, Tensor] | None = None) -> Tensor:
        example = self._example if other is None else other
        devices = [self._device] if self._device.type == "cuda" else []
        with quiet(), torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            loss: Tensor = self._objective(**{key: value.clone() for key, value in example.items()})
        return loss.double()


def _same(loss: Tensor, expected: Tensor) -> bool:
    return torch.allclose(loss, expected, rtol=1e-6, atol=1e-9, equal_nan=True)


def _other(value: Tensor) -> Tensor:
    """Data that `value` could have been: its first sample, turned round, as often as there are samples."""
    if value.dim() == 0:
        return value
    return value[:1].flip(tuple(range(1, value.dim()))).expand_as(value)


def notes_on(changed: Sequence[Attribute]) -> list[str]:
    """What a person should know of changes that may be harmless: a counter can come to matter later."""
    numbers = [attribute.path for attribute in changed if attribute.number]
    if not numbers:
        return []
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return [
        f"forward changes {', '.join(numbers[:3])}{more}; a Python number is taken once, at capture, and stays what it "
        "was then"
    ]


@contextlib.contextmanager
def unchanged_random_state(objective: Objective, example: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise `CaptureError` when Python's or numpy's global random numbers were drawn within it; they are put back."""
    before = [(name, get(), get, put) for name, get, put in _global_generators()]
    drawn = None
    try:
        yield
    finally:
        for name, state, get, put in before:
            if repr(get()) != repr(state):
                drawn = name, state, get, put
                put(state)
    if drawn is None:
        return
    name, *generator = drawn
    place = _line_of_draw(objective, example, *generator)
    raise CaptureError(
        f"{place + ': ' if place else ''}forward draws from {name}, whose numbers would be the same in every step; draw "
        "with torch, and use the numbers as tensors (torch.where instead of if)"
    )


@contextlib.contextmanager
def refused_seeding() -> Iterator[None]:
    """Within it, seeding torch's random numbers raises `CaptureError`: the numbers would not be the seeded ones."""
    seed = torch.manual_seed

    def checked(*_: Any, **__: Any) -> Any:
        raise CaptureError(
            "forward seeds torch's random numbers, but a job seeds each random operator anew in every step; make numbers that "
            "stay the same in __init__ and keep them with register_buffer, or leave torch.manual_seed out"
        )

    torch.manual_seed = torch.random.manual_seed = checked
    try:
        yield
    finally:
        torch.manual_seed = torch.random.manual_seed = seed


def _global_generators() -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], None]]]:
    yield "Python's random", random.getstate, random.setstate
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        yield "numpy.random", numpy.random.get_state, numpy.random.set_state


def _line_of_draw(
    objective: Objective, example: Mapping[str, Tensor], state: Any, get: Callable[[], Any], put: Callable[[Any], None]
) -> str:
    """`file:line` of the first draw, from calling the model once more, line by line; "" if that fails."""
    place, last = "", ""
    put(state)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal place, last
        if place or not is_users(frame.f_code.co_filename):
            return None
        if repr(get()) != repr(state):
            place = last
        last = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return trace

    calls = _Calls(objective, example)
    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        # The refusal stands, with a line or without.
        with contextlib.suppress(Exception):
            calls.loss()
    finally:
        sys.settrace(tracing)
        calls.put_back()
        put(state)
    return place
