"""Data order is a function of (seed, step) only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.sampling import SampleOrder, epoch_order, evaluation_batch, evaluation_batches


def test_the_order_is_pinned_for_all_time() -> None:
    """A change here breaks resuming and workers with other versions; it must never change."""
    assert epoch_order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert epoch_order(2**63 - 1, 5, 6).tolist() == [5, 3, 1, 0, 2, 4]
    assert sorted(epoch_order(7, 3, 100).tolist()) == list(range(100))


@given(
    seed=st.integers(0, 2**63 - 1),
    samples=st.integers(1, 50),
    micro_batches=st.integers(1, 4),
    size=st.integers(1, 9),
    steps=st.integers(1, 8),
)
def test_steps_read_whole_epochs_one_after_the_other(
    seed: int, samples: int, micro_batches: int, size: int, steps: int
) -> None:
    order = SampleOrder(seed, samples, micro_batches, size)
    read = np.concatenate([order.micro_batch(s, m) for s in range(1, steps + 1) for m in range(micro_batches)])
    epochs = -(-len(read) // samples)
    expected = np.concatenate([epoch_order(seed, epoch, samples) for epoch in range(epochs)])[: len(read)]
    assert read.tolist() == expected.tolist()


def test_any_step_can_be_asked_for_in_any_order() -> None:
    ahead = SampleOrder(1, 10, 2, 3)
    late = ahead.micro_batch(40, 1).tolist()
    early = ahead.micro_batch(1, 0).tolist()
    again = SampleOrder(1, 10, 2, 3)
    assert again.micro_batch(1, 0).tolist() == early
    assert again.micro_batch(40, 1).tolist() == late
    with pytest.raises(ValueError, match="no micro-batch"):
        again.micro_batch(0, 0)


def test_held_out_samples_come_in_order_and_whole() -> None:
    assert evaluation_batches(107, 100, 3) == 2
    assert evaluation_batches(100, 100, 3) == 0
    assert evaluation_batch(1, 100, 3).tolist() == [103, 104, 105]
