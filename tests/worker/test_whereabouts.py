"""Which address others are told, and what a worker says of it and of its clock."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from fusion.errors import UserError
from fusion.messages import JoinResponse
from worker import whereabouts
from worker.config import WorkerConfig
from worker.whereabouts import Whereabouts, address_of, clock_in_words, find, in_words

V4, V6 = socket.AF_INET, socket.AF_INET6


def interface(*addresses: tuple[Any, str]) -> list[SimpleNamespace]:
    return [SimpleNamespace(family=family, address=address) for family, address in addresses]


KNOWN = {
    "eth0": interface((V6, "2001:db8::5"), (V4, "192.0.2.5"), (V4, "192.0.2.6")),
    "wg0": interface((V6, "fe80::1%wg0"), (V6, "fd00::7%wg0")),
    "down": interface((V6, "fe80::2%down")),
}


def test_an_interface_is_known_by_its_first_address_that_leads_beyond_the_link() -> None:
    assert address_of("eth0", KNOWN) == "192.0.2.5"
    assert address_of("wg0", KNOWN) == "fd00::7"
    with pytest.raises(UserError, match="--interface 'eth1': this machine has down, eth0, wg0"):
        address_of("eth1", KNOWN)
    with pytest.raises(UserError, match="--interface 'down' has no address; is it up"):
        address_of("down", KNOWN)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, Whereabouts("198.51.100.9", 0, "*", "the address that leads to the coordinator")),
        ({"interface": "eth0"}, Whereabouts("192.0.2.5", 0, "192.0.2.5", "the address of eth0, given by --interface")),
        ({"advertise": "gate:8770"}, Whereabouts("gate", 8770, "*", "given by --advertise")),
        (
            {"advertise": "gate:8770", "interface": "eth0"},
            Whereabouts("gate", 8770, "192.0.2.5", "given by --advertise"),
        ),
        ({"listen": "0.0.0.0"}, Whereabouts("198.51.100.9", 0, "0.0.0.0", "the address that leads to the coordinator")),
    ],
)
async def test_what_was_given_comes_before_what_was_found(
    options: dict[str, str], found: Whereabouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whereabouts.psutil, "net_if_addrs", lambda: KNOWN)
    monkeypatch.setattr(whereabouts, "address_towards", lambda url: "198.51.100.9")
    assert await find(WorkerConfig(join="http://192.0.2.1:8760", **options), print) == found  # type: ignore[arg-type]


async def test_beside_the_coordinator_nobody_else_is_let_in() -> None:
    found = await find(WorkerConfig(join="http://127.0.0.1:8760"), print)
    assert found == Whereabouts("127.0.0.1", 0, "127.0.0.1", "the coordinator is on this machine")


def answer(**fields: Any) -> JoinResponse:
    return JoinResponse(
        worker="a",
        incarnation="1",
        control_endpoint="tcp://h:1",
        control_public_key="k",
        heartbeat_seconds=1,
        **fields,
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"seen_as": "192.0.2.5", "reachable": True}, "; the coordinator could connect to it"),
        ({"seen_as": "192.0.2.5", "reachable": False}, "can't connect to it: is that port open? --advertise HOST:PORT"),
        ({"seen_as": "203.0.113.7"}, "sees this worker as 203.0.113.7: there is address translation between"),
        ({"seen_as": "127.0.0.1"}, "others will use 192.0.2.5:8770 (why)"),
        ({}, "others will use 192.0.2.5:8770 (why)"),
    ],
)
def test_what_others_will_use_and_whether_that_works_is_one_line(fields: dict[str, Any], words: str) -> None:
    line = in_words("tcp://192.0.2.5:8770", "why", answer(**fields))
    assert line.startswith("others will use 192.0.2.5:8770 (why)")
    assert words in line
    assert "\n" not in line
    if not fields or fields["seen_as"] == "127.0.0.1":
        assert line == words


def test_an_address_of_six_has_its_brackets() -> None:
    assert in_words("tcp://[fd00::7]:8770", "why", answer()) == "others will use [fd00::7]:8770 (why)"


@pytest.mark.parametrize(
    ("time", "words"),
    [
        (None, None),
        (1000.0, None),
        (1004.0, None),  # As long as the question took nothing is known.
        (1008.5, None),
        (1300.0, "is 4m56s behind the coordinator's"),
        (990.0, "is 10.0 s ahead of the coordinator's"),
    ],
)
def test_a_clock_that_is_wrong_is_told_of(time: float | None, words: str | None) -> None:
    line = clock_in_words(answer(time=time), 1000.0, 1004.0)
    assert (line is None) == (words is None)
    assert words is None or (line is not None and words in line and "NTP" in line)
