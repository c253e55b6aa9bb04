"""Whose probes this worker answers, and with how many bytes: those that the coordinator has announced. Sans I/O."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from fusion.wire import FrameKind, Header
from worker.protocol.admission import Refused


@dataclass(slots=True)
class _Allowance:
    until: float
    bytes_left: int


class ProbeAnswers:
    """`expect` and `forget` from any thread; `answer` on the receiver thread. Workers are known by their public keys."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._allowed: dict[str, _Allowance] = {}

    def expect(self, key: str, max_bytes: int, until: float) -> None:
        """The worker with this key may probe, until then and with so many bytes in both directions together."""
        with self._lock:
            self._allowed[key] = _Allowance(until, max_bytes)

    def forget(self, now: float) -> list[str]:
        """Drop whose time is over; returns their keys."""
        with self._lock:
            over = [key for key, allowed in self._allowed.items() if now >= allowed.until]
            for key in over:
                del self._allowed[key]
        return over

    def expects(self, key: str) -> bool:
        return key in self._allowed

    def answer(self, probe: Header, key: str, payloads: Sequence[int], now: float) -> tuple[Header, int]:
        """The answer's header and the size of its payload. Raises `Refused` beyond what was announced."""
        wanted = probe.shape[0] if len(probe.shape) == 1 else 0
        with self._lock:
            allowed = self._allowed.get(key)
            if allowed is None or now >= allowed.until:
                raise Refused("sender", "a probe that the coordinator has not announced")
            allowed.bytes_left -= wanted + sum(payloads)
            if allowed.bytes_left < 0:
                raise Refused("size", f"a probe of more bytes than were announced ({wanted} wanted back)")
        shape = (wanted,) if wanted else ()
        return Header("", 0, FrameKind.PROBED, 0, probe.step, 0, shape=shape), wanted
