"""Gives every worker a network of its own behind a link of a given rate: namespaces, veth pairs and token buckets.

Needs root, `ip` and `tc`. The workers' links meet in a bridge; the coordinator stands at the bridge itself, so its own
link is not shaped. Both directions of each link have the rate; delay is not added, the queue is 100 ms long.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from benchmarks.namespaces import COORDINATOR, NamespaceNetwork, run, run_if_possible

_BURST = 32 * 1024
_QUEUE_SECONDS = 0.1


def unavailable() -> str | None:
    """Why this machine can't shape links, in words; None when it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if lacking:
        return f"{' and '.join(lacking)} not found; install iproute2"
    with suppress(subprocess.CalledProcessError), ShapedNetwork(["probe"], 100e6):
        return None
    return "this kernel lacks network namespaces, veth, bridges or token buckets"


class ShapedNetwork(NamespaceNetwork):
    """Each worker's namespace is tied to the bridge by a link of this rate."""

    def __init__(self, workers: Sequence[str], bits_per_second: float) -> None:
        super().__init__(workers, "10.77")
        self._rate = int(bits_per_second)

    def cut(self, worker: str) -> None:
        """Let nothing through to or from this worker any more; connections are not closed."""
        self._plug(worker, "down")

    def heal(self, worker: str) -> None:
        """Take `cut` back."""
        self._plug(worker, "up")

    def keep_apart(self, *workers: str) -> None:
        """Let nothing through between these workers, as between homes; each still reaches the coordinator and all others."""
        for worker in workers:
            run("ip", "link", "set", self._outer(worker), "type", "bridge_slave", "isolated", "on")

    def _outer(self, worker: str) -> str:
        return f"{self._tag}v{list(self.namespaces).index(worker)}"

    def _plug(self, worker: str, state: str) -> None:
        run("ip", "link", "set", self._outer(worker), state)

    def _build(self, undo: ExitStack) -> None:
        undo.callback(run_if_possible, "ip", "link", "del", self._tag)
        run("ip", "link", "add", self._tag, "type", "bridge")
        run("ip", "addr", "add", f"{self.host}/24", "dev", self._tag)
        run("ip", "link", "set", self._tag, "up")
        queue = max(4 * _BURST, int(self._rate / 8 * _QUEUE_SECONDS))
        bucket = ("root", "tbf", "rate", str(self._rate), "burst", str(_BURST), "limit", str(queue))
        for number, namespace in enumerate(self.namespaces.values()):
            outer = f"{self._tag}v{number}"
            inside = ("ip", "-n", namespace)
            # The pair goes with its namespace.
            run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            run("ip", "link", "set", outer, "master", self._tag, "up")
            run(*inside, "addr", "add", f"{self._address(COORDINATOR + 1 + number)}/24", "dev", "eth0")
            run(*inside, "link", "set", "lo", "up")
            run(*inside, "link", "set", "eth0", "up")
            run("tc", "qdisc", "add", "dev", outer, *bucket)
            run("tc", "-n", namespace, "qdisc", "add", "dev", "eth0", *bucket)
