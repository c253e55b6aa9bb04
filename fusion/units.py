"""Quantities as people write them: `2GiB`, `16Mbit/s`, `90ms`. Values are plain numbers in bytes, bytes/s and seconds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_NUMBER = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z/]*)\s*$")
_BYTES = {
    "": 1,
    "b": 1,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_RATE = {
    "": 1.0,
    "bit/s": 1 / 8,
    "kbit/s": 1e3 / 8,
    "mbit/s": 1e6 / 8,
    "gbit/s": 1e9 / 8,
    "b/s": 1.0,
    "kb/s": 1e3,
    "mb/s": 1e6,
    "gb/s": 1e9,
}
_SMALL_B = re.compile(r"([kKmMgG]?)b/[sS]")
"""Not folded: `16Mb/s` is 16 megabits to most people, an eighth of what `16MB/s` is."""
_TIME = {"": 1.0, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def _parse(value: object, units: dict[str, Any], what: str, example: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{what} must be a number or text such as {example}")
    if isinstance(value, int | float):
        number, unit = float(value) if abs(value) < 2**1023 else math.inf, ""
    else:
        match = _NUMBER.match(value)
        if not match or match[2].lower() not in units:
            raise ValueError(f"can't read {value!r} as {what}; write it like {example}")
        number, unit = float(match[1]), match[2].lower()
    total = number * float(units[unit])
    if not 0 <= total < float("inf"):
        raise ValueError(f"{what} must be zero or more and finite, got {value!r}")
    return total


def parse_bytes(value: object) -> int:
    """`2GiB` -> 2147483648. Raises `ValueError`."""
    return int(_parse(value, _BYTES, "a size", "2GiB"))


def parse_rate(value: object) -> float:
    """`16Mbit/s` -> 2e6 bytes per second; a bare number is bytes per second.

    Raises `ValueError`, also for `16Mb/s`, which is bits to some and bytes to others.
    """
    match = _NUMBER.match(value) if isinstance(value, str) else None
    small = _SMALL_B.fullmatch(match[2]) if match else None
    if match and small:
        number, prefix = match[1], small[1]
        bits, octets = f"{number}{prefix}bit/s", f"{number}{prefix.upper().replace('K', 'k')}B/s"
        raise ValueError(f"can't tell whether {value!r} is bits or bytes; write {bits} or {octets}")
    return _parse(value, _RATE, "a bandwidth", "16Mbit/s")


def parse_seconds(value: object) -> float:
    """`90ms` -> 0.09 seconds; a bare number is seconds. Raises `ValueError`."""
    return _parse(value, _TIME, "a duration", "90ms")


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a pydantic field, both included, as people write them: `Within(parse_seconds, "1ms", "24h")`."""

    parse: Callable[[str], float]
    least: str
    most: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def check(value: float) -> float:
            if not self.holds(value):
                raise PydanticCustomError(
                    "out_of_bounds", "must be between {least} and {most}", {"least": self.least, "most": self.most}
                )
            return value

        return core_schema.no_info_after_validator_function(check, handler(source))

    def holds(self, value: float) -> bool:
        """Whether a value in plain units is within."""
        return self.parse(self.least) <= value <= self.parse(self.most)


def format_bytes(count: float) -> str:
    """1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_rate(bytes_per_second: float) -> str:
    """2e6 -> `16 Mbit/s`."""
    bits = 8 * bytes_per_second
    for factor, unit in ((1e9, "Gbit/s"), (1e6, "Mbit/s"), (1e3, "kbit/s")):
        if bits >= factor:
            return f"{bits / factor:.3g} {unit}"
    return f"{bits:.3g} bit/s"


def format_seconds(seconds: float) -> str:
    """0.012 -> `12 ms`; 75 -> `1m15s`."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def format_pace(tokens: float | None, samples: float | None) -> str:
    """`1,234 tokens/s` of text, `12.5 samples/s` of other data; `-` while neither is known."""
    if tokens:
        return f"{tokens:,.0f} tokens/s"
    return f"{samples:,.1f} samples/s" if samples else "-"


def plural(word: str, count: int) -> str:
    """`worker` of one, `workers` of none or several."""
    return word if count == 1 else f"{word}s"


ByteCount = Annotated[int, BeforeValidator(parse_bytes)]
BytesPerSecond = Annotated[float, BeforeValidator(parse_rate)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
MEMORY = Within(parse_bytes, "1B", "1000TiB")
SomeBytes = Annotated[ByteCount, MEMORY]
"""Of memory."""
SPEED = Within(float, "1e-6", "1e24")
"""FLOP/s, or relative to another worker. What a task takes stays a finite time, far from the ends of a float."""
Bandwidth = Annotated[BytesPerSecond, Within(parse_rate, "1bit/s", "1000000GB/s")]
"""Of memory or a link, above 0, so that what travels there takes a finite time."""
