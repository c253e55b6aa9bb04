"""Which samples make up a micro-batch: a function of (seed, step, micro-batch) only, the same in every process.

The training samples `0 .. n-1` are read in epochs. Epoch `e` reads them in the order `argsort(k, stable)`, where `k` are
the first `n` raw 64-bit outputs of numpy's counter-based generator `Philox(key=[seed, e])`: raw outputs are the part of
numpy that is promised never to change, so workers with different numpy versions still agree. The run reads the epochs one
after the other without a gap: sample `i` of micro-batch `m` of step `s` (steps from 1) is at position
`((s - 1) * micro_batches + m) * micro_batch_size + i`, and a step may straddle two epochs.

Held-out samples (`n .. samples-1`) are read in order; evaluation batches are whole micro-batches.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def epoch_order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """The order in which epoch `epoch` (from 0) reads the training samples; shape `(samples,)`."""
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    keys: NDArray[np.uint64] = generator.random_raw(samples)
    return np.argsort(keys, kind="stable")


class SampleOrder:
    """Micro-batches of sample indices for one job; keeps the order of the two newest epochs in memory."""

    def __init__(self, seed: int, train_samples: int, micro_batches: int, micro_batch_size: int) -> None:
        if min(train_samples, micro_batches, micro_batch_size) < 1:
            raise ValueError("train_samples, micro_batches and micro_batch_size must be at least 1")
        self._seed = seed
        self._samples = train_samples
        self._micro_batches = micro_batches
        self._size = micro_batch_size
        self._orders: dict[int, NDArray[np.int64]] = {}

    def micro_batch(self, step: int, micro_batch: int) -> NDArray[np.int64]:
        """Sample indices of one micro-batch, shape `(micro_batch_size,)`; `step` counts from 1, `micro_batch` from 0."""
        if step < 1 or not 0 <= micro_batch < self._micro_batches:
            raise ValueError(f"no micro-batch {micro_batch} in step {step}")
        first = ((step - 1) * self._micro_batches + micro_batch) * self._size
        indices = np.empty(self._size, dtype=np.int64)
        filled = 0
        while filled < self._size:
            epoch, offset = divmod(first + filled, self._samples)
            piece = self._order(epoch)[offset : offset + self._size - filled]
            indices[filled : filled + len(piece)] = piece
            filled += len(piece)
        return indices

    def _order(self, epoch: int) -> NDArray[np.int64]:
        order = self._orders.get(epoch)
        if order is None:
            order = epoch_order(self._seed, epoch, self._samples)
            if len(self._orders) >= 2:
                del self._orders[min(self._orders)]
            self._orders[epoch] = order
        return order


def evaluation_batches(samples: int, train_samples: int, micro_batch_size: int) -> int:
    """How many whole micro-batches the held-out samples fill."""
    return max(0, samples - train_samples) // micro_batch_size


def evaluation_batch(batch: int, train_samples: int, micro_batch_size: int) -> NDArray[np.int64]:
    """Sample indices of evaluation batch `batch` (from 0), shape `(micro_batch_size,)`."""
    first = train_samples + batch * micro_batch_size
    return np.arange(first, first + micro_batch_size, dtype=np.int64)
