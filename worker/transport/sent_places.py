"""The activations that were sent from here and whose gradients come back with values at the same places only.

The compute thread puts them in and takes them out; the thread that receives looks up the places. There are no more of them
than micro-batches in flight.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from compress import Places
from fusion.wire import Header
from worker.transport.parcel import Parcel


class SentPlaces:
    """Parcels by (edge, step, micro-batch), until the gradient was used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parcels: dict[tuple[int, int, int], Parcel] = {}

    def put(self, activation: Header, parcel: Parcel) -> None:
        with self._lock:
            self._parcels[activation.key[1:]] = parcel

    def find(self, gradient: Header) -> Places | None:
        """The places that a gradient with this header has, if it is still to come."""
        with self._lock:
            parcel = self._parcels.get(gradient.key[1:])
        return None if parcel is None else parcel.places()

    def drop(self, edge: int, step: int, micro_batch: int) -> None:
        """The gradient was used."""
        with self._lock:
            self._parcels.pop((edge, step, micro_batch), None)

    def retain(self, edges: Collection[int]) -> None:
        """Only these edges begin here from now on."""
        with self._lock:
            self._parcels = {key: parcel for key, parcel in self._parcels.items() if key[0] in edges}

    def __len__(self) -> int:
        return len(self._parcels)
