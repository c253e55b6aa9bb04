"""The address that other workers will use, why that one, and what the coordinator found when it looked: all in words."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import psutil

from fusion.addresses import bracketed, is_loopback
from fusion.errors import UnreachableError, UserError
from fusion.messages import JoinResponse
from fusion.units import format_seconds
from worker.config import WorkerConfig
from worker.joining import address_towards

_LONGEST_DELAY = 30.0
_SKEW_SECONDS = 5.0


class _Address(Protocol):
    @property
    def family(self) -> Any: ...

    @property
    def address(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """`host` and `port` are what others are told (port 0: the one that is bound), `bind` is where to listen."""

    host: str
    port: int
    bind: str
    why: str


async def find(config: WorkerConfig, say: Callable[[str], None]) -> Whereabouts:
    """However long it takes until there is a way to the coordinator. Raises `UserError`."""
    advertised, interface = config.advertised, config.interface
    own = address_of(interface, psutil.net_if_addrs()) if interface is not None else None
    if advertised is not None:
        return Whereabouts(*advertised, config.listen or own or "*", "given by --advertise")
    if own is not None:
        return Whereabouts(own, 0, config.listen or own, f"the address of {interface}, given by --interface")
    host = await _towards_the_coordinator(config.coordinator, say)
    if is_loopback(host):
        return Whereabouts(host, 0, config.listen or host, "the coordinator is on this machine")
    return Whereabouts(host, 0, config.listen or "*", "the address that leads to the coordinator")


async def _towards_the_coordinator(url: str, say: Callable[[str], None]) -> str:
    delay = 1.0
    while True:
        try:
            return await _in_a_thread(lambda: address_towards(url))
        except UnreachableError as error:
            say(f"{error}; trying again in {delay:.0f} s")
        await asyncio.sleep(delay)
        delay = min(2 * delay, _LONGEST_DELAY)


async def _in_a_thread(look: Callable[[], str]) -> str:
    """In a thread that nobody waits for, unlike asyncio's: while no name server answers, a worker can still go at once."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[str] = loop.create_future()

    def settle(address: str, error: Exception | None) -> None:
        if found.done():
            return
        if error is not None:
            found.set_exception(error)
        else:
            found.set_result(address)

    def work() -> None:
        address, failure = "", None
        try:
            address = look()
        except Exception as error:
            failure = error
        with suppress(RuntimeError):  # The loop is closed: nobody asks any more.
            loop.call_soon_threadsafe(settle, address, failure)

    threading.Thread(target=work, name="whereabouts", daemon=True).start()
    return await found


def address_of(interface: str, known: Mapping[str, Sequence[_Address]]) -> str:
    """The interface's first address of IPv4, else of IPv6 beyond the link. Raises `UserError`."""
    if interface not in known:
        raise UserError(f"--interface {interface!r}: this machine has {', '.join(sorted(known))}")
    for family in (socket.AF_INET, socket.AF_INET6):
        for entry in known[interface]:
            if entry.family == family and not entry.address.lower().startswith("fe80:"):
                return entry.address.partition("%")[0]
    raise UserError(f"--interface {interface!r} has no address; is it up?")


def in_words(endpoint: str, why: str, answer: JoinResponse) -> str:
    """What others will use, and whether that is likely to work."""
    place = urlsplit(endpoint)
    line = f"others will use {bracketed(place.hostname or '')}:{place.port} ({why})"
    seen = answer.seen_as
    if answer.reachable:
        return f"{line}; the coordinator could connect to it"
    if answer.reachable is False:
        return (
            f"{line}, but the coordinator can't connect to it: is that port open? --advertise HOST:PORT fixes one; "
            "until then workers that can't connect meet it at a relay"
        )
    if seen and seen != place.hostname and not is_loopback(seen):
        return (
            f"{line}, but the coordinator sees this worker as {seen}: there is address translation between; "
            "workers that can't connect meet it at a relay, --advertise HOST:PORT with a forwarded port is the direct way"
        )
    return line


def clock_in_words(answer: JoinResponse, asked_at: float, answered_at: float) -> str | None:
    """What to say when this machine's clock and the coordinator's differ by more than the question took."""
    if answer.time is None:
        return None
    behind, ahead = answer.time - answered_at, asked_at - answer.time
    skew = max(behind, ahead)
    if skew <= _SKEW_SECONDS:
        return None
    which = "behind" if behind > 0 else "ahead of"
    return (
        f"the clock here is {format_seconds(skew)} {which} the coordinator's: training does not mind, but times in logs won't "
        "match and certificates may be refused; set it (NTP)"
    )
