"""Ops under construction: what capture's passes rewrite before the DAG is numbered and frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dag.graph import Arg, Named, Op, OpKind, Ref

if TYPE_CHECKING:
    from dag.capture.autocast import Region

Value = Any
"""A draft's argument: None, bool, int, float, str, Named, another Draft, or a tuple of these."""


@dataclass(eq=False, slots=True)
class Draft:
    """A mutable op; arguments point at other drafts directly, so that passes can insert and drop freely."""

    name: str
    kind: OpKind
    target: str
    args: tuple[Value, ...] = ()
    kwargs: dict[str, Value] = field(default_factory=dict)
    module: str = ""
    no_grad: bool = False
    autocast: Region | None = None
    """The autocast region it stands in."""
    where: str = ""
    """`file:line` of the user's code that made it."""

    def inputs(self) -> Iterator[Draft]:
        """The drafts that it reads, in argument order, with repeats."""
        for value in (*self.args, *self.kwargs.values()):
            yield from drafts_of(value)

    def substitute(self, replace: Callable[[Draft], Draft]) -> None:
        """Point its arguments at `replace(draft)` instead."""
        self.args = tuple(_substituted(value, replace) for value in self.args)
        self.kwargs = {name: _substituted(value, replace) for name, value in self.kwargs.items()}


def drafts_of(value: Value) -> Iterator[Draft]:
    if isinstance(value, Draft):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from drafts_of(item)


def _substituted(value: Value, replace: Callable[[Draft], Draft]) -> Value:
    if isinstance(value, Draft):
        return replace(value)
    if isinstance(value, tuple):
        return tuple(_substituted(item, replace) for item in value)
    return value


def replace_everywhere(drafts: Iterable[Draft], replacements: dict[Draft, Draft]) -> None:
    """Redirect every use of a key of `replacements` to its value, following chains."""
    for draft in drafts:
        draft.substitute(lambda source: final(source, replacements))


def final(draft: Draft, replacements: dict[Draft, Draft]) -> Draft:
    """What `draft` is replaced by in the end."""
    while draft in replacements:
        draft = replacements[draft]
    return draft


def number(drafts: Sequence[Draft]) -> list[Op]:
    """Ops with ids by position and unique names; shapes and costs are still empty."""
    ids = {draft: position for position, draft in enumerate(drafts)}
    names: dict[str, int] = {}
    ops = []
    for draft, position in ids.items():
        repeats = names.get(draft.name, 0)
        name = draft.name
        while name in names:
            name = f"{draft.name}_{repeats}"
            repeats += 1
        names[draft.name] = repeats
        names.setdefault(name, 0)
        ops.append(
            Op(
                id=position,
                name=name,
                kind=draft.kind,
                target=draft.target,
                args=tuple(_numbered(value, ids) for value in draft.args),
                kwargs=tuple((key, _numbered(value, ids)) for key, value in draft.kwargs.items()),
                module=draft.module,
                no_grad=draft.no_grad,
            )
        )
    return ops


def number_one(draft: Draft, sources: Sequence[Draft]) -> Op:
    """One call alone, as an op whose references are positions in `sources`."""
    ids = {source: position for position, source in enumerate(sources)}
    return Op(
        id=len(sources),
        name=draft.name,
        kind=draft.kind,
        target=draft.target,
        args=tuple(_numbered(value, ids) for value in draft.args),
        kwargs=tuple((key, _numbered(value, ids)) for key, value in draft.kwargs.items()),
        no_grad=draft.no_grad,
    )


def _numbered(value: Value, ids: dict[Draft, int]) -> Arg:
    if isinstance(value, Draft):
        return Ref(ids[value])
    if isinstance(value, tuple):
        return tuple(_numbered(item, ids) for item in value)
    assert value is None or isinstance(value, bool | int | float | str | Named)
    return value
