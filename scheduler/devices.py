"""Devices and the links between them: what a plan is made for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from fusion.topology import Topology, TopologyLink

FLOPS_PER_BYTE = 8.0
"""A device that does not say how fast its memory is moves one byte per so many FLOPs (a CPU core: 50 GFLOP/s, 6 GB/s)."""
DEFAULT_SPEED = 5e10
"""FLOP/s of a device that nobody measured: one CPU core."""
SECONDS_PER_CALL = 4e-5
"""Fixed time of an operator call that computes something; backward counts two for each. Fitted together with
`TRAINING_SHARE` on one CPU core: a GPT of 2 layers and width 32 takes 3 ms for 26 calls forward and 52 back; one of 4 layers
and width 128 (sequence 64) 16 ms; one of 6 layers and width 256 (sequence 128, batch 4) 235 ms a micro-batch."""
SECONDS_PER_TASK = 1e-3
"""Fixed time of each forward and each backward of a fragment, beside its operators': to start autograd, to take values in and
to pass them on. Fragments of one worker take less; between workers it is messages, cold caches and waiting for the
interpreter as well."""
SECONDS_OF_COLD_CACHES = 7e-4
"""What a task takes longer where another worker's has run on the core meanwhile. Workers that rest measure it, as 0.7 to 1.1 ms."""
TRAINING_SHARE = 0.57
"""FusionLLM's lambda: how much of the speed of a large matrix product training reaches on a device that did not measure it."""


@dataclass(frozen=True, slots=True)
class Processor:
    """What devices may have in common: so many cores, whoever computes on them."""

    name: str
    cores: float


@dataclass(frozen=True, slots=True)
class Device:
    """One worker's machine. `memory_bytes` None: not a constraint."""

    name: str
    region: str = ""
    flops_per_second: float = DEFAULT_SPEED
    memory_bytes: int | None = None
    convolution_flops_per_second: float | None = None
    """Speed of convolutions; None: that of everything."""
    bytes_per_second: float | None = None
    """Memory traffic; None: in proportion to `flops_per_second`."""
    seconds_per_call: float = SECONDS_PER_CALL
    """Fixed time of each operator call that computes something."""
    seconds_per_convolution: float | None = None
    """That of a convolution's; None: that of any call. Its kernel is looked up, and its values put into another layout."""
    seconds_per_task: float = SECONDS_PER_TASK
    """Fixed time of each forward and each backward of a fragment."""
    processor: Processor | None = None
    """Whose cores it computes on; None: it has its own."""
    cores: float = 1.0
    """So many of them it keeps busy while it computes; less than one where it rests between."""

    def __post_init__(self) -> None:
        if not (self.flops_per_second > 0 and math.isfinite(self.flops_per_second)):
            raise ValueError(f"device {self.name} needs a speed above 0 FLOP/s, not {self.flops_per_second}")

    @property
    def traffic_rate(self) -> float:
        """Bytes of memory traffic per second."""
        return self.bytes_per_second or self.flops_per_second / FLOPS_PER_BYTE

    @property
    def convolution_rate(self) -> float:
        """FLOP/s of convolutions."""
        return self.convolution_flops_per_second or self.flops_per_second

    @property
    def convolution_call(self) -> float:
        """Fixed seconds of each call of a convolution."""
        return self.seconds_per_call if self.seconds_per_convolution is None else self.seconds_per_convolution

    def slowed(self, times: float) -> Device:
        """The same device, so many times slower in everything that it computes."""
        return replace(
            self,
            flops_per_second=self.flops_per_second / times,
            convolution_flops_per_second=self.convolution_rate / times,
            bytes_per_second=self.traffic_rate / times,
            seconds_per_call=self.seconds_per_call * times,
            seconds_per_convolution=self.convolution_call * times,
            seconds_per_task=self.seconds_per_task * times,
        )


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two workers: a message of n bytes takes `seconds + n / bytes_per_second` (alpha-beta)."""

    bytes_per_second: float
    seconds: float

    def transfer(self, count: float) -> float:
        """Seconds until a message of `count` bytes has arrived over an idle link."""
        return self.seconds + count / self.bytes_per_second


SELF = Link(math.inf, 0.0)
"""From a worker to itself."""
LOOPBACK = Link(5e8, 3e-4)
"""Between processes of one machine, encrypted."""


@dataclass(frozen=True)
class Network:
    """Links between workers, one way each: by pair of names, else by pair of regions, else `default`."""

    default: Link = LOOPBACK
    workers: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    regions: Mapping[tuple[str, str], Link] = field(default_factory=dict)
    region_of: Mapping[str, str] = field(default_factory=dict)
    access: Mapping[str, float] = field(default_factory=dict)
    """Bytes per second of a worker's own connection, which no link by regions exceeds."""

    def link(self, source: str, target: str) -> Link:
        """The link from `source` to `target`."""
        if source == target:
            return SELF
        found = self.workers.get((source, target)) if self.workers else None
        if found is None and self.regions:
            found = self.regions.get((self.region_of.get(source, ""), self.region_of.get(target, "")))
            if found is not None and self.access:
                most = min(self.access.get(source, math.inf), self.access.get(target, math.inf))
                found = found if found.bytes_per_second <= most else Link(most, found.seconds)
        return found or self.default

    @property
    def uniform(self) -> bool:
        """Whether every two workers have the same link."""
        same = all(link == self.default for link in (*self.workers.values(), *self.regions.values()))
        return same and not self.access


def from_topology(topology: Topology) -> tuple[tuple[Device, ...], Network]:
    """Devices and links of a topology file."""
    devices = tuple(
        Device(w.name, w.region, w.speed, w.memory, bytes_per_second=w.memory_bandwidth) for w in topology.workers
    )
    workers, regions = _both_ways(topology.worker_links), _both_ways(topology.region_links)
    # A topology names every pair, so the default is never used between its workers.
    default = min((*workers.values(), *regions.values()), key=lambda link: link.bytes_per_second, default=LOOPBACK)
    access = {worker.name: worker.access for worker in topology.workers if worker.access}
    return devices, Network(default, workers, regions, {device.name: device.region for device in devices}, access)


def _both_ways(links: Mapping[tuple[str, str], TopologyLink]) -> dict[tuple[str, str], Link]:
    found: dict[tuple[str, str], Link] = {}
    for (first, second), given in links.items():
        found[first, second] = found[second, first] = Link(given.bandwidth, given.latency)
    return found


def measured(
    name: str,
    matrix_product_speed: float,
    memory_bytes: int | None = None,
    *,
    convolution_speed: float = 0.0,
    bytes_per_second: float = 0.0,
    training_share: float = 0.0,
    seconds_per_call: float = 0.0,
    convolution_share: float = 0.0,
    seconds_per_convolution: float = 0.0,
) -> Device:
    """A device by what it measured of itself; 0: it did not, and then the figures of one CPU core stand in.

    Speeds are those of large products and convolutions (FLOP/s), of which training reaches the shares.
    """
    share = training_share or TRAINING_SHARE
    return Device(
        name,
        flops_per_second=matrix_product_speed * share if matrix_product_speed > 0 else DEFAULT_SPEED,
        memory_bytes=memory_bytes,
        convolution_flops_per_second=convolution_speed * (convolution_share or share) or None,
        bytes_per_second=bytes_per_second or None,
        seconds_per_call=seconds_per_call or SECONDS_PER_CALL,
        seconds_per_convolution=seconds_per_convolution or None,
    )


def homogeneous(names: Iterable[str], *, flops_per_second: float = DEFAULT_SPEED) -> tuple[Device, ...]:
    """Equal devices without a memory limit."""
    return tuple(Device(name, flops_per_second=flops_per_second) for name in names)
