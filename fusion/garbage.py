"""Keeps Python's garbage collector off what lives long."""

from __future__ import annotations

import gc


def settle() -> None:
    """Collect what can be, and take what is left for long-lived: collections don't look through it until the next call.

    A process that has loaded torch holds some hundred thousand objects. A full collection takes the interpreter lock for tens of
    milliseconds, each time that as many new ones have come, whichever thread makes them.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
