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
        ("1Gbit/s", "0", r"links\[0\].bandwidth: must be between 1bit/s and 1000000GB/s, got 0$"),
        ("1Gbit/s", "1e-300", r"links\[0\].bandwidth: must be between 1bit/s and 1000000GB/s, got 1e-300$"),
        ("1Gbit/s", "1e7GB/s", r"links\[0\].bandwidth: must be between 1bit/s and 1000000GB/s, got '1e7GB/s'$"),
        ("1Gbit/s", "1Gb/s", r"links\[0\].bandwidth: can't tell whether '1Gb/s' is bits or bytes; write 1Gbit/s or"),
        ("latency: 1ms", "latency: 2h", r"links\[0\].latency: must be between 0s and 1h, got '2h'$"),
        ("memory: 8GiB", "memory: 0", r"workers\[2\].memory: must be between 1B and 1000TiB, got 0$"),
        ("memory: 8GiB", "memory: 1e290GiB", r"workers\[2\].memory: must be between 1B and 1000TiB"),
        ("memory: 8GiB", f"memory: {400 * '9'}", r"workers\[2\].memory: a size must be zero or more and finite"),
        ("speed: 2.0e+11", "speed: true", r"pool.yaml:4:34: workers\[2\].speed: expected a number, got true$"),
        ("speed: 2.0e+11", "speed: 1, count: true", r"workers\[2\].count: expected a whole number, got true$"),
        ("memory: 8GiB", "memory: true", r"workers\[2\].memory: a size must be a number or text such as 2GiB$"),
        ("speed: 2.0e+11", "speed: 1e-300", r"workers\[2\].speed: must be between 1e-6 and 1e24, got 1e-300$"),
        ("speed: 2.0e+11", "speed: 1e300", r"workers\[2\].speed: must be between 1e-6 and 1e24, got 1e\+300$"),
        (
            "name: lima-1",
            "name: lima-1, memory_bandwidth: 1e-300",
            r"workers\[2\].memory_bandwidth: must be between 1bit/s",
        ),
        (
            "[lima-1, oslo-2]",
            "[lima-1, oslo]",
            r"pool.yaml:8:6: links\[2\].between: 'lima-1' is a worker and 'oslo' a region; give two regions or two workers$",
        ),
        (
            "[lima-1, oslo-2]",
            "[oslo, lima-1]",
            "'lima-1' is a worker and 'oslo' a region; give two regions or two workers$",
        ),
        (
            "[lima-1, oslo-2]",
            "[oslo-2, oslo-2]",
            r"links\[2\].between: 'oslo-2' is one worker, and a link has two ends; give two regions or two workers$",
        ),
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
        ("speed: 2.0e+11", "speed: .nan", r"workers\[2\].speed"),
        ("name: lima-1", "name: lima-1, access: 0", r"workers\[2\].access: must be between 1bit/s"),
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


def test_a_problem_of_the_only_worker_is_the_only_problem(tmp_path):
    with pytest.raises(SpecError) as caught:
        load(tmp_path, "workers:\n  - {name: a, region: a, speed: 0, memory: 1GiB}\n")
    assert str(caught.value).endswith("pool.yaml:2:26: workers[0].speed: must be between 1e-6 and 1e24, got 0")
    with pytest.raises(SpecError, match=r"pool.yaml:1:1: workers: expected at least 1 items, got 0$"):
        load(tmp_path, "workers: []\n")


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


NAMESAKES = """\
workers:
  - {name: oslo, region: oslo, speed: 1, memory: 4GiB, access: 1Mbit/s}
  - {name: lima, region: lima, speed: 0.5, memory: 4GiB}
  - {name: lima-2, region: lima, speed: 0.5, memory: 4GiB}
links:
  - {between: [oslo, lima], bandwidth: 16Mbit/s, latency: 90ms}
  - {between: [lima, lima], bandwidth: 1Gbit/s, latency: 1ms}
  - {between: [oslo, lima-2], bandwidth: 8Mbit/s, latency: 80ms}
"""


def test_a_link_of_workers_called_like_their_regions_is_the_regions(tmp_path):
    pool = load(tmp_path, NAMESAKES)
    assert pool.link("oslo", "lima") == pool.link("lima", "oslo") == (125e3, 0.09), "access counts on a region's link"
    assert pool.link("lima", "lima-2") == (125e6, 0.001)
    assert pool.link("oslo", "lima-2") == (1e6, 0.08), "lima-2 is no region, so these are two workers"


def test_workers_called_like_regions_of_others_may_have_a_link(tmp_path):
    pool = load(
        tmp_path,
        """\
workers:
  - {name: b, region: a, speed: 1, memory: 1GiB, access: 1Mbit/s}
  - {name: c, region: a, speed: 1, memory: 1GiB}
  - {name: d, region: b, speed: 1, memory: 1GiB}
links:
  - {between: [a, a], bandwidth: 3Mbit/s, latency: 1ms}
  - {between: [a, b], bandwidth: 2Mbit/s, latency: 1ms}
  - {between: [b, c], bandwidth: 8Mbit/s, latency: 8ms}
""",
    )
    assert pool.link("b", "c") == (1e6, 0.008)
    assert pool.link("c", "d") == (0.25e6, 0.001)
    assert pool.link("b", "d") == (0.125e6, 0.001)
