"""Runs the ops of a fragment on a flat list of values: everything that can be decided once is decided when it is built.

Each op becomes one instruction: a function, a getter that picks its arguments out of the list, the place of its result,
and the places that are free after it. Plain arguments (numbers, dtypes, ...) stand in the list as well, so most getters
are one `operator.itemgetter`. Values are dropped at their last use, as a Python function's rebound locals would be.
Several threads may run an interpreter at the same time, each on a list of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import torch

from dag.graph import Arg, Op, Ref, refs_of
from dag.operators import materialize, resolve
from executor.randomness import one_at_a_time, op_seed, seeder
from fusion.errors import DagError, DataError

Values = list[Any]
Watch = Callable[[int, torch.Tensor], None]
"""Told of an op's value."""
_Getter = Callable[[Values], Sequence[Any]]
_Instruction = tuple[Callable[..., Any], _Getter, int, tuple[int, ...]]


class _Run(threading.local):
    """What a thread runs for now."""

    step = 0
    micro_batch = 0
    watch: Watch | None = None


class Interpreter:
    """A compiled list of ops.

    `given` are the ops whose values are there before the run: bound once with `bind` (parameters, constants) or set for
    each run in the list that `fresh` makes (data, arrivals). `kept` are the ops whose values the caller reads afterwards,
    `watched` those whose values it is shown as they are computed. `numbers` says by op what random ones are seeded with
    besides; their ids when left out.
    Raises `DagError` when an op reads a value that is neither given nor computed before it.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        given: Iterable[int],
        kept: Iterable[int],
        *,
        device: torch.device,
        job_seed: int = 0,
        evaluation: bool = False,
        watched: Iterable[int] = (),
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._ops = tuple(ops)
        self._device = device
        self._job_seed = job_seed
        self._numbers = numbers
        self._evaluation = evaluation
        self._seed = seeder(device) if any(op.random for op in ops) else None
        self._now = _Run()
        self._watched = frozenset(watched)
        self._base: Values = []
        self.slot: dict[int, int] = {}
        given = tuple(given)
        for op_id in given:
            self._place(op_id)
        known = set(given)
        for op in ops:
            for source in op.inputs():
                if source not in known:
                    raise DagError(f"op {op.name} ({op.target}) reads op {source}, which is not there at that point")
            known.add(op.id)
            self._place(op.id)
        self._instructions = self._compile(ops, frozenset(given) | frozenset(kept))

    def bind(self, op_id: int, value: Any) -> None:
        """Set a value that every run starts with. An op that this interpreter never reads is passed over."""
        if op_id in self.slot:
            self._base[self.slot[op_id]] = value

    def fresh(self) -> Values:
        """The list for one run: bound values are in it; set the others by `slot`."""
        return self._base.copy()

    def run(self, values: Values, step: int, micro_batch: int, watch: Watch | None = None) -> None:
        """Compute every op into `values`, with random ops seeded for (step, micro-batch); show `watch` the watched ones.

        Raises `DataError`, with step and micro-batch, when an index is beyond what it points into: that is up to the data.
        """
        now = self._now
        now.step, now.micro_batch, now.watch = step, micro_batch, watch
        result = -1
        try:
            for function, arguments, result, free in self._instructions:
                values[result] = function(*arguments(values))
                for slot in free:
                    values[slot] = None
        except IndexError as error:
            raise DataError(f"{self._place_of(result)}: {error}; a sample holds an index that is too large") from error

    def _place_of(self, slot: int) -> str:
        """What computes the value at `slot` in this run, in words."""
        op = next(op for op in self._ops if self.slot[op.id] == slot)
        of = f" of {op.module}" if op.module else ""
        part = "evaluation batch" if self._evaluation else "micro-batch"
        return f"step {self._now.step}, {part} {self._now.micro_batch}: {op.target}{of}"

    def _place(self, op_id: int) -> None:
        self.slot[op_id] = len(self._base)
        self._base.append(None)

    def _compile(self, ops: Sequence[Op], lasting: frozenset[int]) -> list[_Instruction]:
        last_use = {op.id: index for index, op in enumerate(ops)}
        for index, op in enumerate(ops):
            last_use.update((source, index) for source in op.inputs())
        free: list[list[int]] = [[] for _ in ops]
        for op_id, index in last_use.items():
            if op_id not in lasting:
                free[index].append(self.slot[op_id])
        return [(*self._call(op), self.slot[op.id], tuple(slots)) for op, slots in zip(ops, free, strict=True)]

    def _call(self, op: Op) -> tuple[Callable[..., Any], _Getter]:
        if op.kind == "loss":
            return _same, self._getter(op.args)
        function = resolve(op.target)
        # The overload object only forwards to the dispatcher's function; calling that one saves a Python frame per op.
        function = getattr(function, "_op", function)
        plain = {name: materialize(arg, {}, self._device) for name, arg in op.kwargs if not _mentions(arg)}
        computed = [(name, arg) for name, arg in op.kwargs if _mentions(arg)]
        if plain:
            function = partial(function, **plain)
        if computed:
            function = _with_keywords(function, len(op.args), tuple(name for name, _ in computed))
        if op.random:
            function = self._seeded(function, op.id if self._numbers is None else self._numbers[op.id])
        if op.no_grad:
            function = _without_grad(function)
        if op.id in self._watched:
            function = self._shown(function, op.id)
        return function, self._getter((*op.args, *(arg for _, arg in computed)))

    def _seeded(self, function: Callable[..., Any], number: int) -> Callable[..., Any]:
        seed, now = self._seed, self._now
        assert seed is not None

        def call(*args: Any) -> Any:
            drawn = op_seed(self._job_seed, now.step, now.micro_batch, number, evaluation=self._evaluation)
            with one_at_a_time:
                seed(drawn)
                return function(*args)

        return call

    def _shown(self, function: Callable[..., Any], op_id: int) -> Callable[..., Any]:
        now = self._now

        def call(*args: Any) -> Any:
            value = function(*args)
            if now.watch is not None:
                now.watch(op_id, value)
            return value

        return call

    def _getter(self, args: tuple[Arg, ...]) -> _Getter:
        """What picks `args` out of the list of values, as a sequence."""
        if any(isinstance(arg, tuple) and _mentions(arg) for arg in args):
            return _nested([self._picker(arg) for arg in args])
        slots = [self.slot[arg.op] if isinstance(arg, Ref) else self._plain(arg) for arg in args]
        if not slots:
            return _nothing
        if len(slots) == 1:
            return _single(slots[0])
        return itemgetter(*slots)

    def _plain(self, arg: Arg) -> int:
        self._base.append(materialize(arg, {}, self._device))
        return len(self._base) - 1

    def _picker(self, arg: Arg) -> Callable[[Values], Any]:
        if isinstance(arg, Ref):
            return itemgetter(self.slot[arg.op])
        if isinstance(arg, tuple) and _mentions(arg):
            return _listing([self._picker(item) for item in arg])
        return itemgetter(self._plain(arg))


def _mentions(arg: Arg) -> bool:
    return next(refs_of(arg), None) is not None


def _same(value: Any) -> Any:
    return value


def _nothing(values: Values) -> Sequence[Any]:
    return ()


def _single(slot: int) -> _Getter:
    return lambda values: (values[slot],)


def _nested(pickers: Sequence[Callable[[Values], Any]]) -> _Getter:
    return lambda values: [pick(values) for pick in pickers]


def _listing(pickers: Sequence[Callable[[Values], Any]]) -> Callable[[Values], Any]:
    return lambda values: [pick(values) for pick in pickers]


def _with_keywords(function: Callable[..., Any], positional: int, names: tuple[str, ...]) -> Callable[..., Any]:
    return lambda *args: function(*args[:positional], **dict(zip(names, args[positional:], strict=True)))


def _without_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch.no_grad():
            return function(*args)

    return call
