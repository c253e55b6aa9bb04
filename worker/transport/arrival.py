"""Values that have come in: from their payloads, to what the compute thread takes out of the inbox."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from compress import Codec, Places, buffers
from executor.staging import ToDevice
from fusion.wire import FrameKind, Header
from worker.protocol.admission import Layout, Refused
from worker.transport.parcel import Parcel

Value = TypeVar("Value", Tensor, ToDevice)

FindPlaces = Callable[[Header], Places | None]
"""Which places the activation kept that a gradient with this header answers; None where that is not known (any more)."""


@dataclass(frozen=True, slots=True)
class Thinned(Generic[Value]):
    """A value of which a top-k codec kept some places, which its gradient goes back with."""

    value: Value
    places: Places


Received = Tensor | Thinned[Tensor] | None
"""Off the wire; None for a null gradient."""
Arrival = Received | ToDevice | Thinned[ToDevice] | Parcel
"""For a task: off the wire, on its way to the device, or made on this worker."""


def received(payload: memoryview, header: Header, layout: Layout, find: FindPlaces) -> Tensor | Thinned[Tensor]:
    """The value of an admitted message, in memory of its own. Raises `FrameError`.

    Plain values take a short way, without a codec's checks: admission has made them.
    """
    shape, dtype = layout.shape, layout.dtype
    if layout.codec == "none" and layout.exact_bytes:
        return buffers.tensor_of(payload, shape, dtype)
    codec = Codec(layout.settings)
    if codec.needs_places and header.codec == layout.codec and layout.exact_bytes is None:
        known = find(header) if header.kind is FrameKind.GRADIENT else None
        if known is None:
            raise Refused("places", f"{header.kind.name} {header.edge} came without places, and has none here")
        return codec.decode(payload, shape, dtype, known)
    value = codec.decode(payload, shape, dtype)
    places = codec.places(payload, shape, dtype) if layout.answered else None
    return value if places is None else Thinned(value, places)


def kept(parcel: Parcel) -> Received:
    """What a receiver on this worker gets, as if it had been sent."""
    value, places = parcel.received(), parcel.places()
    return value if value is None or places is None else Thinned(value, places)


def tensor_of(value: Received) -> Tensor | None:
    """The value itself."""
    return value.value if isinstance(value, Thinned) else value


def staged(value: Received, to_device: Callable[[Tensor], ToDevice]) -> Arrival:
    """The same, on its way to the device."""
    if isinstance(value, Thinned):
        return Thinned(to_device(value.value), value.places)
    return None if value is None else to_device(value)


def on_device(arrival: Arrival) -> Tensor | None:
    """On the device, for the thread that computes."""
    if isinstance(arrival, Parcel):
        return arrival.received()
    value = arrival.value if isinstance(arrival, Thinned) else arrival
    return value.take() if isinstance(value, ToDevice) else value


def present(arrivals: Mapping[int, Arrival]) -> dict[int, Tensor]:
    """On the device, for the thread that computes, by edge: of arrivals that are never null, as activations are."""
    found: dict[int, Tensor] = {}
    for edge, arrival in arrivals.items():
        value = on_device(arrival)
        assert value is not None
        found[edge] = value
    return found


def places_of(arrival: Arrival) -> Places | None:
    """Which places it kept, where its gradient is to have the same."""
    if isinstance(arrival, Parcel):
        return arrival.places()
    return arrival.places if isinstance(arrival, Thinned) else None
