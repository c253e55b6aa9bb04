"""The fingerprint of a value: BLAKE2b over its bytes, so that what two workers have is compared without sending it again.

128 bits: who wants to pass one value for another has to find a second one for a given digest. It is hashed where it comes in,
so the hash is the fastest one that is safe and in every Python.
"""

from __future__ import annotations

import hashlib

from torch import Tensor

from compress.buffers import bytes_of


def fingerprint(value: Tensor | None) -> str:
    """32 hexadecimal digits; empty for a null gradient."""
    return "" if value is None else hashlib.blake2b(bytes_of(value), digest_size=16).hexdigest()
