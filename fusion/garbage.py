"""Keeps Python's garbage collector off what lives long."""

from __future__ import annotations

import gc


def settle() -> None:
    """Take all that is in memory for long-lived: collections don't look through it any more. Once, with the modules loaded.

    A process that has loaded torch holds some hundred thousand objects. A full collection of them takes the interpreter lock for
    tenths of a second, whichever thread brings it about.
    """
    gc.freeze()
