"""Inputs that should be refused, or be harmless: bytes with faults, plain data with parts changed, requests from an OpenAPI document.

Everything comes from a `random.Random`, so that a number brings an input back, and hypothesis can drive it.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any
from urllib.parse import quote

_SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63), 0.5, -0.0, 1e308, 5e-324),
    *(
        "",
        "x",
        "none",
        "float32",
        "../../etc/passwd",
        "a" * 300,
        "\x00",
        "\u202e",
        "💥",
        "=1+1",
        "{{7*7}}",
        "%s%n",
        "1e9",
    ),
    *([], {}, [[]], [None], {"": None}),
)
_BYTES = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xc1",
    b"\xdf\xff\xff\xff\xff",
    b"\xdd\x7f\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
)
_METHODS = ("GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS")


def faulty_bytes(data: bytes, random: Random) -> bytes:
    """`data` with one to four faults: changed, cut, inserted, repeated or exchanged parts."""
    found = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(found) + 1)
        end = min(len(found), at + random.randint(1, 16))
        match random.randrange(6):
            case 0 if found:
                found[min(at, len(found) - 1)] ^= 1 << random.randrange(8)
            case 1:
                del found[at:end]
            case 2:
                found[at:at] = random.choice(_BYTES)
            case 3:
                found[at:at] = found[at:end] * random.randint(1, 3)
            case 4:
                found[at:end] = random.randbytes(end - at)
            case _:
                del found[at:]
    return bytes(found)


def changed(value: Any, random: Random) -> Any:
    """A copy of plain data in which one part, at any depth, is replaced, dropped, doubled or put elsewhere."""
    if isinstance(value, dict) and value and random.random() < 0.8:
        key = random.choice(list(value))
        copy = dict(value)
        action = random.random()
        if action < 0.15:
            del copy[key]
        elif action < 0.25:
            copy[random.choice(["x", "", key + "s", "__class__", "type"]) if isinstance(key, str) else "x"] = value[key]
        elif action < 0.3:
            copy[key] = random.choice(list(value.values()))
        else:
            copy[key] = changed(value[key], random)
        return copy
    if isinstance(value, list | tuple) and value and random.random() < 0.8:
        items = list(value)
        at = random.randrange(len(items))
        action = random.random()
        if action < 0.15:
            del items[at]
        elif action < 0.25:
            items.insert(at, items[at])
        elif action < 0.3:
            items = items * random.randint(2, 50)
        else:
            items[at] = changed(items[at], random)
        return items
    if isinstance(value, int) and not isinstance(value, bool) and random.random() < 0.4:
        return value + random.choice((-1, 1, 2**16, -(2**16)))
    return scalar(random)


def scalar(random: Random) -> Any:
    if random.random() < 0.2:
        return "".join(random.choice(string.printable) for _ in range(random.randrange(40)))
    return random.choice(_SCALARS)


def from_schema(schema: Mapping[str, Any], defs: Mapping[str, Any], random: Random, depth: int = 0) -> Any:
    """A value that mostly fits a JSON schema of pydantic's kind."""
    if "$ref" in schema:
        return from_schema(defs[schema["$ref"].rpartition("/")[2]], defs, random, depth + 1)
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return from_schema(random.choice(schema[several]), defs, random, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return random.choice(schema["enum"])
    match schema.get("type"):
        case "object":
            known = schema.get("properties", {})
            required = set(schema.get("required", ()))
            chosen = [name for name in known if name in required or (depth < 6 and random.random() < 0.3)]
            return {name: from_schema(known[name], defs, random, depth + 1) for name in chosen}
        case "array":
            count = random.randint(0, 3) if depth < 8 else 0
            return [from_schema(schema.get("items", {}), defs, random, depth + 1) for _ in range(count)]
        case "string":
            return _text(schema, random)
        case "integer":
            return random.randint(int(schema.get("minimum", 0)), int(schema.get("maximum", 100)))
        case "number":
            return random.uniform(0.001, 10.0)
        case "boolean":
            return random.random() < 0.5
        case "null":
            return None
    return scalar(random)


def _text(schema: Mapping[str, Any], random: Random) -> str:
    pattern = schema.get("pattern", "")
    if "{64}" in pattern:
        return "".join(random.choice("0123456789abcdef") for _ in range(64))
    size = max(int(schema.get("minLength", 1)), min(random.randint(1, 12), int(schema.get("maxLength", 12))))
    return "".join(random.choice(string.ascii_letters + string.digits) for _ in range(size))


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request to send as it is."""

    method: str
    path: str
    """With the query, encoded."""
    template: str
    """The path of the document that it was made from."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None


def any_request(
    document: Mapping[str, Any],
    tokens: Sequence[str],
    known: Mapping[str, Sequence[str]],
    random: Random,
    bodies: Mapping[str, Any] | None = None,
) -> Request:
    """A request for some operation of an OpenAPI document, mostly right.

    `known` has names that exist by parameter, `bodies` good bodies by path.
    """
    template, operations = random.choice(list(document["paths"].items()))
    method = random.choice(list(operations))
    operation = operations[method]
    defs = document["components"]["schemas"]
    path, query = template, []
    headers: dict[str, str] = {}
    for parameter in operation.get("parameters", ()):
        name, where = parameter["name"], parameter["in"]
        value = from_schema(parameter["schema"], defs, random)
        if known.get(name) and random.random() < 0.7:
            value = random.choice(known[name])
        elif random.random() < 0.4:
            value = scalar(random)
        text = value if isinstance(value, str) else json.dumps(value)
        if where == "path":
            path = path.replace(f"{{{name}}}", quote(text, safe="") or "%00")
        elif where == "query" and random.random() < 0.7:
            query.append(f"{quote(name)}={quote(text, safe='')}")
        elif where == "header" and random.random() < 0.7:
            headers[name] = random.choice(
                ["bytes=0-10", "bytes=5-1", "bytes=-3", "bytes=99999999999-", "x", "bytes=0-0,5-6"]
            )
    if random.random() < 0.03:
        method = random.choice(_METHODS)
    if random.random() < 0.95:
        headers["Authorization"] = f"Bearer {random.choice(tokens)}"
    body = None
    if "requestBody" in operation:
        body = _body(operation["requestBody"]["content"], defs, random, (bodies or {}).get(template))
        headers["Content-Type"] = random.choice(["application/json", "application/octet-stream", "text/plain", ""])
    return Request(method.upper(), path + (f"?{'&'.join(query)}" if query else ""), template, headers, body)


def _body(content: Mapping[str, Any], defs: Mapping[str, Any], random: Random, good: Any) -> bytes:
    schema = next(iter(content.values())).get("schema")
    if schema is None:
        return random.randbytes(random.randrange(200))
    value = good if good is not None and random.random() < 0.7 else from_schema(schema, defs, random)
    for _ in range(random.choice((0, 0, 1, 1, 2, 4))):
        value = changed(value, random)
    data = json.dumps(value).encode()
    if random.random() < 0.05:
        return b"[" * random.choice((10, 100_000))
    return faulty_bytes(data, random) if random.random() < 0.2 else data
