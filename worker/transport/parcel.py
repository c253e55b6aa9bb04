"""A value on its way to another fragment: as it was computed, and as its codec makes it, once, where first needed."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from compress import ErrorFeedback, Places, codec
from executor.staging import ToHost


class Parcel:
    """One value and how it travels. `value` is None for a null gradient. Don't write to the value afterwards.

    `staged` is the copy to the host under way, for a value on another device. With `feedback`, what the codec loses is
    kept as `residual`, and that of `before` (the parcel before this one, or a tensor) is added to the value first. `places`
    are those at which a codec that reuses places takes the values.
    """

    __slots__ = (
        "_before",
        "_codec",
        "_dtype",
        "_feedback",
        "_head",
        "_lock",
        "_options",
        "_payload",
        "_places",
        "_residual",
        "_seed",
        "_shape",
        "_staged",
        "_value",
        "null",
    )

    def __init__(
        self,
        value: Tensor | None,
        codec: str = "none",
        options: Mapping[str, float] | None = None,
        seed: int = 0,
        staged: ToHost | None = None,
        *,
        places: Places | None = None,
        feedback: bool = False,
        before: Parcel | Tensor | None = None,
    ) -> None:
        self.null = value is None
        self._value = value
        self._codec = codec
        self._options = options or {}
        self._seed = seed
        self._staged = staged
        self._places = places
        self._head = len(places.head) if places is not None else 0
        self._feedback = feedback
        self._before = before
        self._residual: Tensor | None = None
        self._payload: memoryview | None = None
        self._shape = () if value is None else tuple(value.shape)
        self._dtype = None if value is None else value.dtype
        self._lock = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether `payload` costs nothing."""
        if self.null or self._payload is not None:
            return True
        return self._codec == "none" and (self._staged is None or self._staged.ready)

    @property
    def nbytes(self) -> int:
        """Memory that it takes now."""
        payload = self._payload
        if payload is not None:
            return payload.nbytes
        value = self._value
        return 0 if value is None else value.nbytes

    def payload(self) -> memoryview | None:
        """What goes over the wire; encodes when nobody has yet."""
        if self.null:
            return None
        for parcel in self._not_encoded_before():
            parcel.payload()
        with self._lock:
            if self._payload is None:
                assert self._value is not None
                value = self._staged.wait() if self._staged is not None else self._value
                self._payload = self._encoded(value)
                self._staged = None
                if self._codec != "none" or value is not self._value:
                    # The payload is all that is needed from here on; keeping both would take the memory twice.
                    self._value = None
            return self._payload

    def payload_for(self, codec: str) -> memoryview | None:
        """What goes over the wire under a header that says `codec`: without the places where the receiver has them."""
        payload = self.payload()
        return payload[self._head :] if payload is not None and self._head and codec == self._codec else payload

    def places(self) -> Places | None:
        """Which places its payload has kept; None where it has all."""
        payload, dtype = self.payload(), self._dtype
        if payload is None or dtype is None:
            return None
        return codec(self._codec, **self._options).places(payload, self._shape, dtype)

    def residual(self) -> Tensor | None:
        """What the codec left over; encodes when nobody has yet. Only for the last parcel of a chain: the next takes it."""
        self.payload()
        return self._residual

    def _encoded(self, value: Tensor) -> memoryview:
        if self._codec == "none":
            return _bytes_of(value)
        chosen = codec(self._codec, **self._options)
        places, self._places = self._places, None
        if not self._feedback:
            return chosen.encode(value, self._seed, places)
        before, self._before = self._before, None
        if isinstance(before, Parcel):
            # Nobody else asks for it: a chain is encoded in its order, and each residual is kept once.
            predecessor, before = before, before.residual()
            predecessor._residual = None
        payload, self._residual = ErrorFeedback(chosen).encode(value, self._seed, before, places)
        return payload

    def _not_encoded_before(self) -> list[Parcel]:
        """The parcels of its chain that have to be encoded first, the oldest first: a chain may be too long to recurse."""
        found: list[Parcel] = []
        parcel = self._before
        while isinstance(parcel, Parcel) and parcel._payload is None:
            found.append(parcel)
            parcel = parcel._before
        return found[::-1]

    def received(self) -> Tensor | None:
        """What a receiver gets, in host memory or on the value's own device."""
        if self.null:
            return None
        with self._lock:
            if self._codec == "none" and self._value is not None:
                return self._value
        payload, dtype = self.payload(), self._dtype
        if payload is None or dtype is None:
            return None
        return codec(self._codec, **self._options).decode(payload, self._shape, dtype)


def _bytes_of(value: Tensor) -> memoryview:
    """The value's memory; the short way for what most values are."""
    if value.dtype is torch.float32 and value.is_contiguous() and value.device.type == "cpu":
        # Each call into torch gives up the interpreter lock, and may wait for it.
        array: memoryview = (value.detach() if value.requires_grad else value).numpy().data
        return array
    return codec("none").encode(value)
