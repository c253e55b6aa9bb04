"""Addresses: which of them stay on this machine, and what others may call us."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from urllib.parse import SplitResult, urlsplit

WILDCARDS = ("", "*", "0.0.0.0", "::")


def is_loopback(host: str) -> bool:
    """Whether what listens on `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def reachable_host(bound: str) -> str:
    """What other machines may call us: the bound address, or for all addresses the one that routes outwards."""
    if bound not in WILDCARDS:
        return bound
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # Nothing is sent: it only asks for the route (TEST-NET-1).
        return str(probe.getsockname()[0])
    return socket.gethostname()


def plain(address: str) -> str:
    """An address of a connection as people write it: without zone, and IPv4 as such where it came in by IPv6."""
    return address.partition("%")[0].removeprefix("::ffff:")


def split_url(url: str) -> SplitResult | None:
    """A coordinator's address as a person writes it, with or without `http://`; None where it is no URL."""
    try:
        return urlsplit(url if "//" in url else f"http://{url}")
    except ValueError:  # `http://[::1`
        return None


def place_of(endpoint: str) -> str:
    """The network that `tcp://host:port` is in, by its first bits (24, of IPv6 48); empty for this machine's own."""
    host = ""
    try:
        host = urlsplit(endpoint).hostname or ""
        address = ipaddress.ip_address(host)
    except ValueError:
        return "" if host == "localhost" else host or "unknown"
    if address.is_loopback:
        return ""
    return str(ipaddress.ip_network(f"{address}/{24 if address.version == 4 else 48}", strict=False))


def bracketed(host: str) -> str:
    """`::1` -> `[::1]`, as URLs want it."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
