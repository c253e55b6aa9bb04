"""What a coordinator says when it is ready: where it is, how to join, and what is unsafe about it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from coordinator.config import CoordinatorConfig
from coordinator.entry.access import Access
from coordinator.entry.invitation import Identity
from coordinator.entry.tls import ServerTls
from fusion.addresses import bracketed, is_loopback, reachable_host


@dataclass(frozen=True, slots=True)
class Announcement:
    """The addresses of a coordinator that listens, and the secrets that open it."""

    config: CoordinatorConfig
    access: Access
    tls: ServerTls | None
    http_port: int
    control_port: int

    @property
    def host(self) -> str:
        return public_host(self.config, self.tls)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{bracketed(self.host)}:{self.http_port}"

    @property
    def join_url(self) -> str:
        return Identity.of(self.access.keys.public, self.tls).invitation(self.url, self.access.join_token)

    @property
    def dashboard_url(self) -> str:
        """With a viewer's token where looking needs one."""
        open_reads = is_loopback(self.config.host) and not self.config.require_token
        return f"{self.url}/" if open_reads else f"{self.url}/?token={self.access.viewer_token}"

    def for_programs(self) -> str:
        """One line of JSON for the process that started us."""
        control = f"tcp://{bracketed(self.host)}:{self.control_port}"
        ready = {
            "url": self.url,
            "join_url": self.join_url,
            "token": self.access.operator_token,
            "control_endpoint": control,
        }
        return json.dumps(ready)

    def for_people(self, credentials_file: Path, *, secrets: bool) -> list[str]:
        """Lines for a terminal; without `secrets` they say where to get what was left out."""
        lines = [f"Fusion coordinator at {self.url}"]
        if not self.config.no_dashboard:
            lines.append(f"  dashboard   {self.dashboard_url if secrets else self.url + '/'}")
        join = f"fusion worker --join '{self.join_url}'" if secrets else "see `fusion token create --role join`"
        lines.append(f"  add worker  {join}")
        lines.append(f"  client      fusion submit JOB  (address and token are in {credentials_file})")
        lines.append(f"  state       {self.config.state}")
        lines.append("Ctrl-C stops it; workers train on, and report to it when it is started again.")
        return lines


def public_host(config: CoordinatorConfig, tls: ServerTls | None) -> str:
    """What others call us: the address they reach, or a name that the certificate is for."""
    host = reachable_host(config.host)
    return tls.public_host(host) if tls is not None else host


def warnings(config: CoordinatorConfig, tls: ServerTls | None) -> list[str]:
    """What a person should mend, a line each."""
    if tls is None:
        if is_loopback(config.host):
            return []
        return [
            f"listening on {config.host or '*'} without TLS: tokens, data and models can be read on the way; "
            "give --tls-cert and --tls-key, or stay in a private network"
        ]
    if not tls.covers(public_host(config, tls)):
        return [
            f"{tls.certificate} names no host or address: every client will refuse it; make one with subjectAltName"
        ]
    return []


def goes_to_the_journal(stream: TextIO = sys.stdout) -> bool:
    """Whether systemd keeps what is printed here, for everybody who may read its journal."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
