"""The topology file: lookups, and what is wrong with it in words."""

from __future__ import annotations

import math

import pytest

from fusion.errors import SpecError
from fusion.topology import load_topology

GOOD = """\
workers:
  - {name: oslo-1, region: oslo, speed: 4.0e+11, memory: 4GiB}
  - {name: oslo-2, region: oslo, speed: 4.0e+11, memory: 4GiB}
  - {name: lima-1, region: lima, speed: 2.0e+11, memory: 8GiB}
links:
  - {between: [oslo, oslo], bandwidth: 1Gbit/s, latency: 1ms}
  - {between: [oslo, lima], bandwidth: 16Mbit/s, latency: 90ms}
  - {between: [lima-1, oslo-2], bandwidth: 8Mbit/s, latency: 80ms}
"""


def load(tmp_path, text: str = GOOD):
    path = tmp_path / "pool.yaml"
    path.write_text(text)
    return load_topology(path)


def test_links(tmp_path):
    pool = load(tmp_path)
    assert pool.link("oslo-1", "oslo-2") == (1e9 / 8, 0.001)
    assert pool.link("oslo-1", "lima-1") == pool.link("lima-1", "oslo-1") == (2e6, 0.09)
    assert pool.link("oslo-2", "lima-1") == (1e6, 0.08), "a pair of workers wins over their regions"
    assert pool.link("lima-1", "lima-1") == (math.inf, 0.0)
    assert pool.worker("lima-1").memory == 8 * 2**30
    with pytest.raises(SpecError, match="no worker 'oslo-3'; did you mean"):
        pool.link("oslo-3", "lima-1")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1Gbit/s", "-1Gbit/s", r"pool.yaml:6:29: links\[0\].bandwidth: can't read"),
        ("1Gbit/s", "0", r"links\[0\].bandwidth: input should be greater than 0"),
        ("latency: 1ms", "latency: -1", r"links\[0\].latency: a duration must be zero or more"),
        (
            "[oslo, oslo]",
            "[oslo, olso]",
            r"links\[0\].between: no worker or region is called 'olso'; did you mean 'oslo'",
        ),
        ("[oslo, lima]", "[oslo, oslo]", r"pool.yaml:7:6: links\[1\].between: a link between oslo and oslo was given"),
        ("name: oslo-2", "name: oslo-1", r"pool.yaml:3:6: workers\[1\].name: two workers are called 'oslo-1'"),
        ("  - {between: [oslo, lima], bandwidth: 16Mbit/s, latency: 90ms}\n", "", "no link between oslo-1 and lima-1"),
        ("memory: 8GiB", "memry: 8GiB", "3 problems|2 problems"),
        ("speed: 2.0e+11", "speed: .inf", r"workers\[2\].speed"),
        ("name: lima-1", "name: lima-1, access: 0", r"workers\[2\].access: input should be greater than 0"),
        ("name: lima-1", "name: lima-1, count: 0", r"workers\[2\].count: input should be greater than or equal to 1"),
        ("name: lima-1", "name: oslo, count: 2", r"pool.yaml:4:6: workers\[2\].name: two workers are called 'oslo-1'"),
        ("name: lima-1", "name: lima, count: 9999", r"pool.yaml:4:5: workers\[2\]: more than 10000 workers"),
        ("name: lima-1", f"name: {64 * 'l'}, count: 2", "longer than 64 letters"),
        ("name: lima-1", "name: lima, count: 2", "no link between lima-1 and lima-2: add {between: .lima, lima."),
    ],
)
def test_problems(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(SpecError, match=message):
        load(tmp_path, GOOD.replace(old, new))


def test_alike_workers_are_written_once(tmp_path):
    pool = load(tmp_path, GOOD.replace("name: oslo-2", "name: oslo-other, count: 3").replace("oslo-2", "oslo-other-2"))
    names = [worker.name for worker in pool.workers]
    assert names == ["oslo-1", "oslo-other-1", "oslo-other-2", "oslo-other-3", "lima-1"]
    assert pool.link("oslo-other-2", "lima-1") == (1e6, 0.08)
    assert pool.link("oslo-other-3", "lima-1") == (2e6, 0.09)
    assert type(pool).model_validate(pool.model_dump()) == pool


def test_a_slow_access_caps_links_of_regions_only(tmp_path):
    slow = GOOD.replace("name: lima-1", "name: lima-1, access: 4Mbit/s").replace(
        "name: oslo-1", "name: oslo-1, access: 2Mbit/s"
    )
    pool = load(tmp_path, slow)
    assert pool.link("oslo-1", "lima-1") == (0.25e6, 0.09), "the slower end decides"
    assert pool.link("oslo-1", "oslo-2") == (0.25e6, 0.001)
    assert pool.link("lima-1", "oslo-2") == (1e6, 0.08), "a link between two workers is what it says"
