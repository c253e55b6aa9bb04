"""Server-sent events as the coordinator sends them: each one a kind and a JSON object."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fusion.errors import CoordinatorError

MAX_LINE_BYTES = 64 * 2**20
"""Longer than the record of any job or pool; something else answers, or the memory of this process is meant."""


@dataclass(frozen=True)
class StreamItem:
    """One server-sent event: `kind` is `job`, `metrics`, `event` or `log`."""

    kind: str
    data: dict[str, Any]


def server_sent_events(response: http.client.HTTPResponse) -> Iterator[StreamItem]:
    """The items of a response until it ends. Raises `CoordinatorError` when what comes is no such item."""
    kind = "message"
    lines: list[str] = []
    while raw := response.readline(MAX_LINE_BYTES):
        if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
            raise CoordinatorError(f"a line of the stream is longer than {MAX_LINE_BYTES} bytes")
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if not line:
            if lines:
                yield StreamItem(kind, _object("\n".join(lines)))
            kind, lines = "message", []
        elif line.startswith("event:"):
            kind = line[6:].strip()
        elif line.startswith("data:"):
            lines.append(line[5:].removeprefix(" "))


def _object(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise CoordinatorError("an item of the stream is no JSON object; is this a Fusion coordinator?")
    return data
