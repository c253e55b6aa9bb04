"""Server-sent events as the coordinator sends them: each one a kind and a JSON object."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class StreamItem:
    """One server-sent event: `kind` is `job`, `metrics`, `event` or `log`."""

    kind: str
    data: dict[str, Any]


def server_sent_events(response: http.client.HTTPResponse) -> Iterator[StreamItem]:
    """The items of a response until it ends."""
    kind = "message"
    lines: list[str] = []
    while raw := response.readline(MAX_LINE_BYTES):
        line = raw.decode("utf-8", "replace").rstrip("\r\n")
        if not line:
            if lines:
                data = json.loads("\n".join(lines))
                if isinstance(data, dict):
                    yield StreamItem(kind, data)
            kind, lines = "message", []
        elif line.startswith("event:"):
            kind = line[6:].strip()
        elif line.startswith("data:"):
            lines.append(line[5:].removeprefix(" "))
