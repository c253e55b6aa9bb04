"""Reads a YAML file into a pydantic model, and says file, line, column and a suggestion for everything that does not fit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from yaml.reader import ReaderError

from fusion.errors import SpecError

Model = TypeVar("Model", bound=BaseModel)
MAX_FILE_BYTES = 4 * 2**20


_MOST_BITS = 4096
_TAGS = {"bool": "true or false", "int": "a whole number", "float": "a number", "timestamp": "a date"}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with YAML 1.2 floats: `1e-3` is a number, not text. Every problem has its place."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            made = super().construct_object(node, deep=deep)
            # Python refuses to write out far larger ones, also in a message that says what is wrong with them.
            if isinstance(made, int) and made.bit_length() > _MOST_BITS:
                raise OverflowError
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            tag = node.tag.rpartition(":")[2]
            hint = "; put it in quotes if it is text" if tag == "timestamp" else ""
            message = f"can't read {_shown(node.value)} as {_TAGS.get(tag, tag)}{hint}"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None
        return made


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class PlacedError(ValueError):
    """For validators that look at a whole document: says which value inside it is wrong."""

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path


class Section(BaseModel):
    """A part of a file that people write: unknown keys are refused, and `true` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name] if info.field_name is not None else None
        items = list(enumerate(value)) if isinstance(value, list | tuple) else [(None, value)]
        for place, item in items:
            if field is not None and isinstance(item, bool):
                number = _number_in(field.annotation, field.metadata)
                if number is not None:
                    wanted = f"expected {_EXPECTED[number]}, got {_kind(item)}"
                    raise PlacedError(wanted, *([] if place is None else [place]))
        return value


def _number_in(annotation: Any, notes: Sequence[Any] = ()) -> str | None:
    """`int` or `float` where values of this type, or their items, are numbers and nothing else reads them first."""
    if any(isinstance(note, BeforeValidator) for note in notes):
        return None
    if annotation in (int, float):
        return str(annotation.__name__)
    if get_origin(annotation) is Annotated:
        inner, *notes = get_args(annotation)
        return _number_in(inner, notes)
    if get_origin(annotation) in (Union, UnionType, tuple, list) and bool not in get_args(annotation):
        return next((found for part in get_args(annotation) if (found := _number_in(part)) is not None), None)
    return None


def suggest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'steps'?`, or the list of what is known when nothing is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def read_yaml(path: Path, what: str) -> tuple[Any, yaml.Node | None]:
    """Parse a file into plain data and the node tree that knows where each value stands. Raises `SpecError`."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SpecError(f"{path}: too large for a {what} ({MAX_FILE_BYTES // 2**20} MiB at most)")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; give the path of a {what}") from None
    except IsADirectoryError:
        raise SpecError(f"{path}: is a folder; give the path of a {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: can't read this {what}: {error}") from None
    try:
        loader = _Loader(text)
    except ReaderError as error:
        line, column = text.count("\n", 0, error.position) + 1, error.position - text.rfind("\n", 0, error.position)
        raise SpecError(
            f"{path}:{line}:{column}: not valid YAML: a control character ({text[error.position]!r})"
        ) from None
    try:
        node = loader.get_single_node()
        if node is not None:
            _refuse_repeated_keys(path, node)
        data = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        context = f" {error.context}" if error.context and error.problem_mark else ""
        raise SpecError(f"{place}: not valid YAML: {error.problem or error.context}{context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise SpecError(f"{path}: nested too deeply for a {what}") from None
    finally:
        loader.dispose()
    return data, node


def place_of(path: Path, key: Sequence[str], what: str) -> str:
    """`file:line:column` of a key's value, or of what should hold it; "" where the file has nothing of the kind."""
    try:
        _, node = read_yaml(path, what)
    except SpecError:
        return ""  # It was good a moment ago; whatever has become of it is not what is to be told.
    keys = node.value if isinstance(node, yaml.MappingNode) else []
    mark = _mark_of(node, key) if any(name.value == key[0] for name, _ in keys) else None
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else ""


def load_model(path: Path, model: type[Model], what: str) -> Model:
    """Read `path` and validate it as `model`. Raises `SpecError` that lists every problem with its place."""
    data, node = read_yaml(path, what)
    if not isinstance(data, dict):
        raise SpecError(f"{path}:1:1: a {what} is a mapping of keys to values, this file holds {_kind(data)}")
    return validate(model, data, where=str(path), node=node)


def validate(model: type[Model], data: Mapping[str, Any], *, where: str, node: yaml.Node | None = None) -> Model:
    """Validate plain data as `model`; `node` gives the places when the data came from a file. Raises `SpecError`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = _problems(error, model, where, node)
    if len(problems) == 1:
        raise SpecError(problems[0])
    listed = "\n".join(f"  {problem}" for problem in problems)
    raise SpecError(f"{where}: {len(problems)} problems\n{listed}")


def _mark_of(node: yaml.Node | None, path: Sequence[str | int]) -> yaml.Mark | None:
    """Where the value stands, or, where it is missing, what should hold it."""
    mark = node.start_mark if node is not None else None
    for part in path:
        found: tuple[yaml.Node, yaml.Node] | None = None
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = (node.value[part], node.value[part])
        if found is None:
            break
        mark, node = found[0].start_mark, found[1]
    return mark


def _as_written(key: Any, node: yaml.Node | None, path: Sequence[str | int]) -> str:
    """How the file writes a key that is no text in the mapping at `path`: `null` became None, `yes` became True."""
    for part in path:
        if isinstance(node, yaml.MappingNode):
            node = next((value for name, value in node.value if name.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
    for name, _ in node.value if isinstance(node, yaml.MappingNode) else []:
        if name.tag != "tag:yaml.org,2002:str" and isinstance(name, yaml.ScalarNode):
            made = yaml.constructor.SafeConstructor().construct_object(name)
            if type(made) is type(key) and made == key:
                return str(name.value)
    return str(key)


def _refuse_repeated_keys(path: Path, root: yaml.Node) -> None:
    pending, seen_nodes = [root], set()
    while pending:
        node = pending.pop()
        if id(node) in seen_nodes:
            continue
        seen_nodes.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise SpecError(
                            f"{path}:{line}:{key.start_mark.column + 1}: key {key.value!r} stands here again "
                            f"(first in line {seen[key.value]}); keep one"
                        )
                    seen[key.value] = line
                pending.append(value)
        elif isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)


def _problems(error: ValidationError, model: type[BaseModel], where: str, node: yaml.Node | None) -> list[str]:
    by_place: dict[tuple[str | int, ...], list[str]] = {}
    of_type: set[tuple[str | int, ...]] = set()
    for detail in error.errors(include_url=False):
        if _is_echo(dict(detail)):
            continue
        path, section = _path_in_data(model, detail["loc"])
        cause = (detail.get("ctx") or {}).get("error")
        if isinstance(cause, PlacedError):
            path = (*path, *cause.path)
        message = _message(dict(detail), path, section)
        if detail["type"] == "invalid_key" or detail["loc"][-1:] == ("[key]",):
            path = (*path[:-1], _as_written(detail["input"], node, path[:-1]))
            message = "a key must be text; put it in quotes"
        messages = by_place.setdefault(path, [])
        if detail["type"].endswith("_type"):
            of_type.add(path)
        if message not in messages:
            messages.append(message)
    lines: list[tuple[int, int, str]] = []
    for path, messages in by_place.items():
        if path in of_type and any(len(other) > len(path) and other[: len(path)] == path for other in by_place):
            continue  # Said by the members of a union that another member, which goes deeper, fits better.
        name = _dotted(path)
        text = messages[0]
        if len(messages) > 1 and all(message.startswith("expected ") and ", got " in message for message in messages):
            wanted = " or ".join(message.removeprefix("expected ").split(", got ")[0] for message in messages)
            text = f"expected {wanted}, got {messages[0].split(', got ', 1)[1]}"
        mark = _mark_of(node, path)
        line, column = (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)
        place = f"{where}:{line}:{column}" if line else where
        lines.append((line, column, f"{place}: {name + ': ' if name else ''}{text}"))
    return [text for _, _, text in sorted(lines, key=lambda item: item[:2])]


def _is_echo(detail: dict[str, Any]) -> bool:
    """Pydantic counts items without those that have a problem of their own, so a list may be too short for it only."""
    items = detail.get("input")
    return (
        detail["type"] == "too_short" and isinstance(items, list | tuple) and len(items) >= detail["ctx"]["min_length"]
    )


def _path_in_data(
    model: type[BaseModel], loc: Sequence[str | int]
) -> tuple[tuple[str | int, ...], type[BaseModel] | None]:
    """Pydantic's location without the tags of union members, and the model that the last key belongs to."""
    path: list[str | int] = []
    owner: type[BaseModel] | None = model
    annotation: Any = model
    for part in loc:
        tagged = _members(annotation, part)
        if tagged is not None:
            annotation = tagged
            continue
        section = _model_in(annotation)
        if section is not None and isinstance(part, str):
            owner = section
            field = section.model_fields.get(part)
            annotation = field.annotation if field is not None else None
        elif isinstance(part, int) and get_origin(annotation) in (list, tuple):
            items = [item for item in get_args(annotation) if item is not Ellipsis]
            annotation, owner = items[min(part, len(items) - 1)] if items else None, None
        elif get_origin(annotation) is dict:
            annotation, owner = get_args(annotation)[1], None
        elif section is None and get_origin(annotation) is None and path:
            continue  # the name of a plain union member, such as 'str' or "literal['auto']"
        else:
            annotation, owner = None, None
        path.append(part)
    return tuple(path), owner


def _members(annotation: Any, tag: str | int) -> Any:
    """The union member that pydantic calls `tag`, if `annotation` is a union and has it; its own name counts too."""
    if get_origin(annotation) not in (Union, UnionType):
        return None
    for member in get_args(annotation):
        if get_origin(member) is Annotated:
            inner, *notes = get_args(member)
            if any(isinstance(note, Tag) and note.tag == tag for note in notes):
                return inner
    if isinstance(tag, str) and not any(_is_tagged(member) for member in get_args(annotation)):
        return next((member for member in get_args(annotation) if tag.startswith(_plain_name(member))), object)
    return None


def _plain_name(member: Any) -> str:
    origin = get_origin(member)
    return str(getattr(origin or member, "__name__", member)).lower()


def _is_tagged(member: Any) -> bool:
    return get_origin(member) is Annotated and any(isinstance(note, Tag) for note in get_args(member)[1:])


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Annotated, Union, UnionType):
        return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)
    return None


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "dict": "a mapping of keys to values",
    "list": "a list",
    "tuple": "a list",
    "model": "a mapping of keys to values",
}


def _message(detail: dict[str, Any], path: tuple[str | int, ...], section: type[BaseModel] | None) -> str:
    kind: str = detail["type"]
    value = detail.get("input")
    context: dict[str, Any] = detail.get("ctx") or {}
    if kind == "extra_forbidden":
        known = sorted(section.model_fields) if section is not None else []
        return f"unknown key {str(path[-1])!r}{suggest(str(path[-1]), known)}"
    if kind == "missing":
        description = _description(section, path)
        return f"missing; add it ({description})" if description else "missing; add it"
    if kind == "value_error":
        return str(context.get("error", detail["msg"]))
    if kind == "which":
        wanted = detail["msg"].removeprefix("needs exactly one of these keys: ").split(", ")
        given = [str(key) for key in value] if isinstance(value, dict) else []
        near = next((suggest(key, wanted) for key in given if difflib.get_close_matches(key, wanted, 1)), "")
        return f"{detail['msg']}{', got ' + _kind(value) if not given else ''}{near}"
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        hint = suggest(value, known) if isinstance(value, str) and difflib.get_close_matches(value, known, 1) else ""
        return f"expected {context.get('expected')}, got {_shown(value)}{hint}"
    if kind in ("too_long", "too_short") and isinstance(value, list | tuple):
        bound = context.get("max_length") if kind == "too_long" else context.get("min_length")
        return f"expected at {'most' if kind == 'too_long' else 'least'} {bound} items, got {len(value)}"
    stem = kind.split("_")[0]
    if stem in _EXPECTED and (kind.endswith(("_type", "_parsing", "_from_float")) or kind == "model_type"):
        return f"expected {_EXPECTED[stem]}, got {_shown(value)}"
    message = detail["msg"]
    return f"{message[0].lower()}{message[1:]}, got {_shown(value)}"


def _description(section: type[BaseModel] | None, path: tuple[str | int, ...]) -> str:
    field = section.model_fields.get(str(path[-1])) if section is not None and path else None
    return (field.description or "").rstrip(".") if field is not None else ""


def _dotted(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _shown(value: Any) -> str:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return _kind(value)


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {dict: "a mapping", list: "a list", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
