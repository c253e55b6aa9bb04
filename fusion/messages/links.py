"""How links are measured: by a probe that the coordinator orders, and by what a job's transfers show."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fusion.messages.base import Message, Words
from fusion.messages.pool import PeerAddress


class ExpectProbe(Message):
    """Coordinator -> worker: this worker is about to measure its link to you; answer it, within these bounds."""

    type: Literal["expect-probe"] = "expect-probe"
    peer: PeerAddress
    max_bytes: int = Field(gt=0, description="In both directions together.")
    seconds: float = Field(gt=0)


class ProbeLink(Message):
    """Coordinator -> worker: measure the link to this worker, there and back, within these bounds; say `LinkMeasured`."""

    type: Literal["probe-link"] = "probe-link"
    peer: PeerAddress
    max_bytes: int = Field(gt=0)
    seconds: float = Field(gt=0)


class LinkFigures(Message):
    """One direction of a link: n bytes take `seconds + n / bytes_per_second`."""

    seconds: float = Field(ge=0, allow_inf_nan=False)
    bytes_per_second: float = Field(gt=0, allow_inf_nan=False)


class LinkMeasured(Message):
    """Worker -> coordinator: what `ProbeLink` found out, or why it did not."""

    type: Literal["link-measured"] = "link-measured"
    peer: str
    there: LinkFigures | None = None
    back: LinkFigures | None = None
    error: Words = ""
    reached: bool = Field(True, description="The other worker has let us in.")


class ArrivalRate(Message):
    """Bytes per second at which a peer's large messages came in; `at_least` when the link was not what took the time."""

    bytes_per_second: float = Field(gt=0, allow_inf_nan=False)
    at_least: bool = False


class Arrivals(Message):
    """Worker -> coordinator: what the transfers of a job show of the links to here, by peer."""

    type: Literal["arrivals"] = "arrivals"
    rates: dict[str, ArrivalRate]
