"""The fingerprint of a value: half of a SHA-256 over its bytes, so that two workers can be compared without sending it again."""

from __future__ import annotations

import hashlib

from torch import Tensor

from compress.buffers import bytes_of


def fingerprint(value: Tensor | None) -> str:
    """32 hexadecimal digits; empty for a null gradient."""
    return "" if value is None else hashlib.sha256(bytes_of(value)).hexdigest()[:32]
