"""How much of its snapshots a worker is asked for ahead, so that what it sends of the training waits little. Sans I/O.

A link carries what it is given in turn: whatever is asked for and not here yet may lie before an activation or a gradient. So
the *window* grows while answers come as soon as the first ones did, and halves when they have begun to queue, as in
LEDBAT (RFC 6817): the delay that counts is that over the least one seen, since a far source is not a busy one.
"""

from __future__ import annotations

import math
from collections import deque

BLOCK_BYTES = 16 * 1024
MOST_BLOCKS = 16
"""In one answer."""
_LEAST_WINDOW, _FIRST_WINDOW, _LARGEST_WINDOW = 1, 4, 256
"""In blocks."""
_QUEUED_SECONDS = 0.01
"""Answers may take so much longer than the quickest one did."""
_SAMPLES = 4
"""One late answer is chance, on a machine that is busy; so many in a row are a queue."""
_GENTLE = 16
"""Once answers have queued, the window grows by a block each time that it has come in; a large one by one part in so many."""
_PARTS = 4
"""Answers that a window is asked for in, so that there is always one under way."""


class Pull:
    """The window of one source."""

    def __init__(self) -> None:
        self._window = float(_FIRST_WINDOW)
        self._steep = True
        self._least = math.inf
        self._recent: deque[float] = deque(maxlen=_SAMPLES)
        self._settling = 0.0
        """Blocks that were asked for before the window was halved: they say nothing of how it is now."""

    @property
    def window(self) -> int:
        """Blocks that may be asked for and not be here yet."""
        return int(self._window)

    def blocks(self, under_way: int) -> int:
        """How many to ask for in one message now, while so many are under way; 0: none yet."""
        part = min(max(self.window // _PARTS, 1), MOST_BLOCKS)
        return part if under_way == 0 or under_way + part <= self.window else 0

    def came(self, blocks: int, seconds: float) -> None:
        """So many came, so long after they were asked for."""
        self._least = min(self._least, seconds)
        self._settling -= blocks
        if self._settling > 0:
            return
        self._recent.append(seconds)
        if seconds < self._least + _QUEUED_SECONDS:
            growth = blocks if self._steep else blocks / min(self._window, _GENTLE)
            self._window = min(self._window + growth, _LARGEST_WINDOW)
        elif len(self._recent) == _SAMPLES and min(self._recent) >= self._least + _QUEUED_SECONDS:
            if self.window == _LEAST_WINDOW:
                # Nothing of ours queues: the way has become longer.
                self._least = min(self._recent)
            self._settling = self._window
            self._window = max(self._window / 2, _LEAST_WINDOW)
            self._steep = False
            self._recent.clear()
