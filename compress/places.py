"""The places that a top-k payload kept, for a gradient that comes back with values at the same places and nothing else.

Both ends have them without sending them again: the one in the payload that it sent, the other in the payload that it got.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress import indices
from compress.settings import TOPK_PREFIX, TOPK_PREFIX_BYTES


@dataclass(frozen=True, slots=True)
class Places:
    """`head` is how a payload with these places begins, as it was sent: much smaller than the positions themselves."""

    head: bytes
    elements: int
    """Of the whole tensor."""

    @property
    def count(self) -> int:
        return int(TOPK_PREFIX.unpack_from(self.head)[0])

    def positions(self) -> indices.Positions:
        """Ascending. Raises `FrameError` for what no encoder writes."""
        count, encoding = TOPK_PREFIX.unpack_from(self.head)
        return indices.decode(encoding, np.frombuffer(self.head, np.uint8)[TOPK_PREFIX_BYTES:], count, self.elements)
