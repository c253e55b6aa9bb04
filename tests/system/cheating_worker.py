"""`python -m cheating_worker worker ...`: the command line, with a worker that lies when its name says so.

A worker named `cheat-STEP` lies from that step on: the activations and gradients that it passes on are off by a thousandth.
"""

from __future__ import annotations

import sys

from fusion.cli import main
from fusion.wire import FrameKind, Header
from worker.protocol.session import Session
from worker.transport.parcel import Parcel

FALSE = 1.001
_LIED_OF = (FrameKind.ACTIVATION, FrameKind.GRADIENT)


def lie(since: int) -> None:
    """Have this process do so."""
    honest = Session.emit

    def emit(self: Session[Parcel], header: Header, parcel: Parcel) -> None:
        if header.step >= since and header.kind in _LIED_OF and (value := parcel.received()) is not None:
            parcel = Parcel(value * FALSE)
        honest(self, header, parcel)

    Session.emit = emit  # type: ignore[method-assign]


if __name__ == "__main__":
    name = sys.argv[sys.argv.index("--name") + 1]
    if name.startswith("cheat-"):
        lie(int(name.removeprefix("cheat-")))
    main()
