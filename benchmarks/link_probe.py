"""What workers' probes say of links beside what the links are, on the testbed (`testbed.py`: root, Linux).

Each link is probed as the coordinator has it done, from 1 to 1000 Mbit/s and from 1 to 100 ms; the table has the figures, the
bytes that were sent at most, and how long it took with the handshake.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import topologies
from benchmarks.common import Disturbance, machine, report
from benchmarks.testbed import CHECKED, Testbed, inside, unavailable
from coordinator.life.links import MAX_BYTES, MAX_SECONDS
from fusion.messages import LinkMeasured, PeerAddress
from fusion.sockets import new_keys
from worker.transport.mover import Mover
from worker.transport.probe_socket import measure_link


@dataclass(frozen=True)
class Probed:
    """A link as it is, and as a probe found it."""

    megabits: float
    milliseconds: float
    there: float
    back: float
    """Mbit/s."""
    latency: float
    """Milliseconds."""
    took: float
    """Seconds."""


def probe(bed: Testbed) -> tuple[LinkMeasured, float]:
    """Have a worker of one city measure its link to one of the other."""
    asker, answerer, over = new_keys(), new_keys(), threading.Event()
    ports: list[int] = []
    listening = threading.Event()

    def answer() -> None:
        mover = Mover(answerer, lambda line: print(line, file=sys.stderr))
        ports.append(mover.start(bed.address("b-1"), 0))
        mover.expect_probe(PeerAddress(worker="a-1", endpoint="", public_key=asker.public), MAX_BYTES, 60.0)
        listening.set()
        over.wait()
        mover.close()

    def ask() -> tuple[LinkMeasured, float]:
        peer = PeerAddress(worker="b-1", endpoint=f"tcp://{bed.address('b-1')}:{ports[0]}", public_key=answerer.public)
        begin = time.monotonic()
        return measure_link(asker, peer, MAX_BYTES, MAX_SECONDS), time.monotonic() - begin

    answered = inside(bed.namespaces["b-1"], answer)
    listening.wait()
    found = inside(bed.namespaces["a-1"], ask)()
    over.set()
    answered()
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    reason = unavailable()
    if reason is not None:
        raise SystemExit(f"error: {reason}")
    about, disturbance = machine(), Disturbance()
    links = []
    for megabits, milliseconds in CHECKED:
        with Testbed(topologies.two_cities(megabits, milliseconds)) as bed:
            found, took = probe(bed)
        if found.there is None or found.back is None:
            raise SystemExit(f"error: {megabits:g} Mbit/s, {milliseconds:g} ms: {found.error}")
        rates = found.there.bytes_per_second * 8e-6, found.back.bytes_per_second * 8e-6
        links.append(Probed(megabits, milliseconds, *rates, found.there.seconds * 1e3, took))
    disturbed = round(disturbance.cores(), 2)
    rows = [
        [
            f"{link.megabits:g} Mbit/s, {link.milliseconds:g} ms",
            f"{link.there:.2f}",
            f"{link.back:.2f}",
            f"{link.latency:.1f}",
            f"{link.took:.2f}",
        ]
        for link in links
    ]
    data: dict[str, Any] = {
        "machine": about,
        "max_bytes": MAX_BYTES,
        "cores_taken_by_others": disturbed,
        "links": [asdict(link) for link in links],
    }
    report(
        "link_probe",
        f"Links as probes of at most 1 MiB find them; others took {disturbed} cores",
        ["link", "Mbit/s there", "Mbit/s back", "ms", "seconds"],
        rows,
        data,
    )


if __name__ == "__main__":
    main()
