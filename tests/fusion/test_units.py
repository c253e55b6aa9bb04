"""Quantities as people write them."""

from __future__ import annotations

import pytest

from fusion.units import parse_bytes, parse_rate, parse_seconds


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("16Mbit/s", 2e6),
        ("16mbit/s", 2e6),
        ("16 Mbit/s", 2e6),
        ("1Gbit/s", 1.25e8),
        ("8bit/s", 1.0),
        ("16MB/s", 16e6),
        ("16kB/s", 16e3),
        ("16KB/s", 16e3),
        ("1.5GB/s", 1.5e9),
        ("7B/s", 7.0),
        ("7", 7.0),
        (7, 7.0),
    ],
)
def test_rates(text, rate):
    assert parse_rate(text) == rate


@pytest.mark.parametrize(
    ("text", "bits", "octets"),
    [
        ("16Mb/s", "16Mbit/s", "16MB/s"),
        ("16 mb/s", "16mbit/s", "16MB/s"),
        ("2.5Gb/s", "2.5Gbit/s", "2.5GB/s"),
        ("300kb/s", "300kbit/s", "300kB/s"),
        ("300Kb/s", "300Kbit/s", "300kB/s"),
        ("9b/s", "9bit/s", "9B/s"),
    ],
)
def test_a_small_b_is_refused_and_both_readings_are_named(text, bits, octets):
    with pytest.raises(ValueError, match=f"can't tell whether '{text}' is bits or bytes; write {bits} or {octets}"):
        parse_rate(text)
    assert parse_rate(bits) * 8 == pytest.approx(parse_rate(octets))


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (parse_rate, "1e305Gbit/s"),
        (parse_bytes, "1e300TiB"),
        (parse_seconds, "1e305h"),
        (parse_seconds, "1e400"),
        (parse_seconds, float("nan")),
        (parse_bytes, float("inf")),
    ],
)
def test_what_is_not_finite_with_its_unit_is_refused(parse, text):
    with pytest.raises(ValueError, match="must be zero or more and finite"):
        parse(text)
