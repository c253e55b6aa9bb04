"""Codecs as they are written, `int4` or `topk:ratio=100,value_bits=8`: which names and options there are, and what is wrong with others.

It stands below `compress`, which does the coding, so that a job spec with a wrong name is refused where it is read.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence

_OF_INTEGERS = ("block", "stochastic")
_OF_TOPK = ("ratio", "value_bits")
CODEC_OPTIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "bf16": (),
    "int8": _OF_INTEGERS,
    "int4": _OF_INTEGERS,
    "int3": _OF_INTEGERS,
    "int2": _OF_INTEGERS,
    "topk": _OF_TOPK,
    "topk-sampled": _OF_TOPK,
    "topk-reused": _OF_TOPK,
}
"""Every codec that a message may have, and the options that may stand in its name."""

_PLAIN = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")


def read_codec(name: str, known: Sequence[str] = tuple(CODEC_OPTIONS)) -> tuple[str, dict[str, float]]:
    """`topk:ratio=100` -> `("topk", {"ratio": 100.0})`. Raises `ValueError` for anything but a codec of `known` and its options."""
    base, colon, written = name.partition(":")
    if base not in known:
        near = difflib.get_close_matches(base.lower(), known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? Known" if near else "known"
        raise ValueError(f"unknown codec {base!r}; {hint}: {', '.join(known)}")
    options: dict[str, float] = {}
    for item in written.split(",") if colon else ():
        key, _, text = item.partition("=")
        if not item:
            raise ValueError(f"codec {name!r} has an empty option; write it like int8:block=256 or topk:ratio=100")
        if key not in CODEC_OPTIONS[base]:
            its = ", ".join(CODEC_OPTIONS[base]) or "none"
            raise ValueError(f"codec {base} has no option {key!r}; it has: {its}")
        if key in options:
            raise ValueError(f"option {key} of codec {base} is given twice; keep one")
        try:
            options[key] = float(text)
        except ValueError:
            raise ValueError(f"option {key} of codec {base} must be a number, not {text!r}") from None
        check_option(base, key, options[key])
        if not _PLAIN.fullmatch(text):
            raise ValueError(f"option {key} of codec {base} must be written in digits, like 100 or 2.5, not {text!r}")
    return base, options


def check_option(codec: str, option: str, value: float) -> None:
    """Raises `ValueError` for a value that this option of this codec can't have."""
    if option == "ratio":
        wrong = None if 1 <= value < math.inf else "1 or more and finite"
    elif not math.isfinite(value) or value != int(value):
        wrong = "a whole number"
    elif option == "value_bits":
        wrong = None if value in (8, 16, 32) else "8, 16 or 32"
    elif option == "stochastic":
        wrong = None if value in (0, 1) else "0 or 1"
    else:
        wrong = None if 8 <= value <= 65536 and value % 8 == 0 else "a multiple of 8 in 8..65536"
    if wrong:
        raise ValueError(f"option {option} of codec {codec} must be {wrong}, not {value:g}")
