"""Seeds and random bits for stochastic rounding: a function of what is rounded, never of the order things happen in."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def edge_seed(seed: int, step: int, micro_batch: int, edge: int, *, gradient: bool) -> int:
    """The seed for one message's codec, from the job's seed and the message's place."""
    text = f"{seed}/{step}/{micro_batch}/{edge}/{'gradient' if gradient else 'activation'}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_int16(count: int, seed: int) -> NDArray[np.int16]:
    """`count` uniform 16-bit integers. numpy keeps the streams of its bit generators, so they are the same everywhere."""
    words = np.random.SFC64(seed).random_raw(-(-count // 4))
    return np.asarray(words, dtype="<u8").view(np.int16)[:count]
