"""The pools over which `slow_network.py` trains, in which orders torch's ranks stand there, and the plans of ours that are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from benchmarks import topologies
from fusion.topology import Topology

FAST = "fast"
STAGES = 4
"""Ranks of torch's pipelining, which splits the models equally: neither has more than four parts that are alike."""


@dataclass(frozen=True)
class Setting:
    """One pool. `orders` are torch's ranks by name; ours joins as the topology stands."""

    name: str
    title: str
    topology: Callable[[], Topology]
    orders: Mapping[str, tuple[str, ...]]

    @property
    def workers(self) -> list[str]:
        return topologies.names(self.topology())


_CITIES = {"grouped": ("a-1", "a-2", "b-1", "b-2"), "alternating": ("a-1", "b-1", "a-2", "b-2")}
HOME_SHARE = 3.0
"""Its fastest device is a third of a core, so that all six together need little more than one."""

SLOWER = 6.0
"""So many times slower four workers share two cores, and seldom one that another is using: as if each had one of its own."""


def _slow_motion(megabits: float) -> Setting:
    return Setting(
        f"{megabits:g}-slow-motion",
        f"two cities, {megabits:g} Mbit/s, in slow motion",
        lambda: topologies.slow_motion(topologies.two_cities(megabits), SLOWER),
        _CITIES,
    )


_ALL = (
    Setting("8", "two cities, 8 Mbit/s", lambda: topologies.two_cities(8.0), _CITIES),
    Setting("20", "two cities, 20 Mbit/s", lambda: topologies.two_cities(20.0), _CITIES),
    Setting("100", "two cities, 100 Mbit/s", lambda: topologies.two_cities(100.0), _CITIES),
    Setting(FAST, "fast network", topologies.fast, _CITIES),
    Setting(
        "home-devices",
        "home devices",
        lambda: topologies.slower(topologies.home_devices(6), HOME_SHARE),
        {"as joined": ("h-1", "h-2", "h-3", "h-4"), "best connected": ("h-1", "h-5", "h-2", "h-6")},
    ),
    Setting(
        "one-bad-link",
        "one bad link",
        topologies.one_bad_link,
        {"as joined": ("w-1", "w-2", "w-3", "w-4"), "around the bad link": ("w-2", "w-1", "w-3", "w-4")},
    ),
    *(_slow_motion(megabits) for megabits in (8.0, 20.0, 100.0)),
)
SETTINGS = {setting.name: setting for setting in _ALL}
"""By what `--setting` is given; a number is Mbit/s between two cities."""
CITIES = ("8", "20", "100")
SLOW_MOTION = tuple(f"{rate}-slow-motion" for rate in CITIES)


@dataclass(frozen=True)
class Variant:
    """One of our rows."""

    policy: str
    codec: str = "none"
    ratio: float = 100.0
    all_workers: bool = True
    whole: bool = False
    """No gradients of weights wait: what these gain when they do."""

    @property
    def backward(self) -> str | None:
        """Top-k as in the paper, which takes the largest gradients; ours would take those of what was sent."""
        return "topk" if self.codec in ("topk", "adatopk") else None

    @property
    def name(self) -> str:
        codec = {"none": "dense", "topk": f"top-k 1/{self.ratio:g}", "adatopk": f"AdaTopK {self.ratio:g}"}
        free = "" if self.all_workers else ", free to leave workers out"
        whole = ", whole backwards" if self.whole else ""
        return f"{self.policy}, {codec.get(self.codec, self.codec)}{free}{whole}"

    @property
    def uniform(self) -> bool:
        """Whether it looks neither at links nor at what they carry: a baseline."""
        return self.policy != "op-fence" and self.codec != "auto"


DENSE = Variant("op-fence")
HEADLINE = Variant("op-fence", "auto", all_workers=False)
"""What a job gets that says nothing of workers: a device may be left out where it would hurt."""
ALL_TAKE_PART = Variant("op-fence", "auto")
WHOLE_BACKWARDS = replace(HEADLINE, whole=True)
VARIANTS = (
    Variant("equal-ops"),
    Variant("equal-compute"),
    Variant("equal-ops", "topk"),
    Variant("equal-compute", "topk"),
    Variant("equal-compute", "int8"),
    DENSE,
    Variant("op-fence", "topk"),
    Variant("op-fence", "adatopk"),
    Variant("op-fence", "int8"),
    Variant("op-fence", "int4"),
    Variant("equal-ops", "auto"),
    ALL_TAKE_PART,
    HEADLINE,
    WHOLE_BACKWARDS,
)
