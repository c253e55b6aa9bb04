"""Error feedback of one fragment: what its codecs have left over so far, for each edge and direction.

A parcel with feedback is the last link of a chain: it is encoded after the one before it, whose residual it takes along. The
residuals are part of the fragment's state, so a replay from a snapshot encodes the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compress import Places
from executor.staging import ToHost
from fusion.errors import BlobError
from worker.transport.parcel import Parcel
from worker.transport.ways import Way

_PREFIX = "feedback"
_DIRECTIONS = {False: "forward", True: "backward"}


class Feedback:
    """The residuals of what one fragment sends under the plan `plan_id`. `sends` are its (backward, edge) with feedback."""

    def __init__(self, plan_id: str, sends: Mapping[tuple[bool, int], Way]) -> None:
        self._keys = {
            f"{_PREFIX}/{plan_id}/{edge}/{_DIRECTIONS[backward]}": (backward, edge) for backward, edge in sends
        }
        self._ways = dict(sends)
        self._last: dict[tuple[bool, int], Parcel | Tensor | None] = dict.fromkeys(sends)

    def parcel(
        self,
        backward: bool,
        edge: int,
        value: Tensor,
        seed: int,
        staged: ToHost | None,
        places: Places | None = None,
    ) -> Parcel:
        """The next value of this edge. Values have to come in the same order in every run."""
        way, before = self._ways[backward, edge], self._last[backward, edge]
        parcel = Parcel(value, way.codec, way.options, seed, staged, places=places, feedback=True, before=before)
        self._last[backward, edge] = parcel
        return parcel

    def __contains__(self, sent: tuple[bool, int]) -> bool:
        return sent in self._last

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `state`."""
        return tuple(self._keys)

    def state(self) -> dict[str, Tensor]:
        """`feedback/PLAN/EDGE/DIRECTION` -> residual (float32), where something has been sent; encodes what is not yet."""
        found: dict[str, Tensor] = {}
        for key, sent in self._keys.items():
            last = self._last[sent]
            residual = last.residual() if isinstance(last, Parcel) else last
            if residual is not None:
                found[key] = residual
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; keys of other plans and fragments are passed over.

        Raises `BlobError` for a residual of another shape than its edge's values.
        """
        for key, sent in self._keys.items():
            residual = tensors.get(key)
            shape = self._ways[sent].meta.shape
            if residual is not None and tuple(residual.shape) != tuple(shape):
                raise BlobError(
                    f"{key} of the snapshot is of shape {list(residual.shape)}, the edge's is {list(shape)}"
                )
            self._last[sent] = residual
