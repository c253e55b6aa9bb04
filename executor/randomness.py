"""Seeds for random operators: a function of (job seed, step, micro-batch, op), never of the order of execution.

Before a random op runs, the default generator of its device is seeded with `op_seed(...)`, as `torch.manual_seed` would
do for that device alone. A micro-batch therefore draws the same numbers wherever and whenever its op runs, and again when
its activations are recomputed. Evaluation batches draw from seeds of their own. The process has one generator for each
device, so a thread that computes beside others holds `one_at_a_time` from the seeding until the op has drawn.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Callable

import torch

one_at_a_time = threading.Lock()


def op_seed(job_seed: int, step: int, micro_batch: int, op: int, *, evaluation: bool = False) -> int:
    """A seed in 0 .. 2**63 - 1: the first 63 bits of BLAKE2b over the five numbers, little-endian 64-bit each."""
    packed = struct.pack("<5q", job_seed, step, micro_batch, op, evaluation)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def seeder(device: torch.device) -> Callable[[int], object]:
    """The function that seeds `device`'s default generator."""
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # the generators do not exist before it
        index = torch.cuda.current_device() if device.index is None else device.index
        seed: Callable[[int], object] = torch.cuda.default_generators[index].manual_seed
        return seed
    return torch.default_generator.manual_seed
