"""A job spec and the codecs agree on what a codec may be called."""

from __future__ import annotations

from dataclasses import fields
from itertools import product

import pytest
from pydantic import ValidationError

from compress.settings import CODECS, TopK, parse, with_options
from fusion.codec_names import CODEC_OPTIONS, read_codec
from fusion.errors import PlanError
from fusion.spec import CompressionSpec

GOOD = {
    "ratio": ("1", "1.0", "2.5", "2.", "100", "10000000000000000000000"),
    "value_bits": ("8", "16", "32", "16.0"),
    "block": ("8", "64", "65536", "64.0"),
    "stochastic": ("0", "1"),
}
BAD = {
    "ratio": ("0.5", "0", "", "1.2.3", "-2", "+2", "inf", "nan", "1e2", " 2", "1_0", "x", "٣", "9" * 400),
    "value_bits": ("4", "0", "64", "8.5", "inf", "nan", "-8", "eight", ""),
    "block": ("7", "12", "0", "-8", "65544", "8.5", "inf", "nan", "1e2", ""),
    "stochastic": ("2", "0.5", "-1", "true", "nan", ""),
}
PAIRS = list(product(CODEC_OPTIONS, GOOD))
ACCEPTED = [
    *CODEC_OPTIONS,
    *(
        f"{codec}:{option}={value}"
        for codec, option in PAIRS
        if option in CODEC_OPTIONS[codec]
        for value in GOOD[option]
    ),
    "int8:block=256,stochastic=1",
    "topk-reused:value_bits=8,ratio=4",
]
REFUSED = [
    *(
        f"{codec}:{option}={value}"
        for codec, option in PAIRS
        if option in CODEC_OPTIONS[codec]
        for value in BAD[option]
    ),
    *(f"{codec}:{option}={GOOD[option][0]}" for codec, option in PAIRS if option not in CODEC_OPTIONS[codec]),
    *(f"{codec}{rest}" for codec in CODEC_OPTIONS for rest in (":", ":,", ":x", ":x=1", ":=1", " ", "=1")),
    *("", ":", "int5", "INT4", "zip", "adatopk", "auto", "int8:block=8,", "int8:,block=8", "int8:block=8,block=16"),
    *("int8:block=8;stochastic=1", "int8: block=8", "int8:BLOCK=8", "topk:ratio=2:value_bits=8", "topk:ratio=2\n"),
]


@pytest.mark.parametrize("name", ACCEPTED)
def test_both_accept(name: str) -> None:
    base, options = read_codec(name)
    settings = parse(name)
    assert settings == parse(base, options)
    assert {key: float(getattr(settings, key)) for key in options} == options


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(name: str) -> None:
    with pytest.raises(ValueError, match="codec"):
        read_codec(name)
    with pytest.raises(PlanError, match="codec"):
        parse(name)


def test_the_names_and_options_are_those_of_the_codecs() -> None:
    own = {name: {field.name for field in fields(settings)} - {"bits", "sampled"} for name, settings in CODECS.items()}
    assert {name: set(options) for name, options in CODEC_OPTIONS.items()} == own


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_spec_takes_them_too(name: str) -> None:
    reused = name.startswith("topk-reused")
    if not reused:
        assert CompressionSpec(forward=name).forward == name
    if not (reused and "ratio" in name):
        assert CompressionSpec(codec="topk", backward=name).backward == name


@pytest.mark.parametrize("name", [*REFUSED, "topk-reused", "topk-reused:value_bits=8"])
def test_a_spec_refuses_them_too(name: str) -> None:
    with pytest.raises(ValidationError):
        CompressionSpec(forward=name)
    if not name.startswith("topk-reused") or name in REFUSED:
        with pytest.raises(ValidationError):
            CompressionSpec(codec="topk", backward=name)


@pytest.mark.parametrize("ratio", [1.0, 3.7, 100.0, 1e16, 1e22, 123456789.125])
def test_a_ratio_that_is_put_into_a_name_can_be_read_again(ratio: float) -> None:
    assert parse(with_options("topk", ratio=ratio)) == TopK(ratio=ratio)
    assert parse(with_options("topk:ratio=2,value_bits=8", ratio=ratio)) == TopK(ratio=ratio, value_bits=8)
