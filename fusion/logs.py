"""Log lines as JSON, one object a line, for programs that collect them; and no token in any of them."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from enum import Enum
from typing import TextIO

from fusion.console import LineHandler

_TOKEN = re.compile(r"([?&](?:token|cert)=)[^&\s'\"<>]+|((?i:bearer)\s+)[A-Za-z0-9._~+/=-]{8,}")


class LogFormat(Enum):
    """How daemons write what happens: lines for people, or JSON."""

    text = "text"
    json = "json"


def redact(text: str) -> str:
    """`text` without the tokens of the URLs and headers in it."""
    return _TOKEN.sub(lambda found: f"{found[1] or found[2]}...", text)


class JsonFormatter(logging.Formatter):
    """`time`, `level`, `logger` and `message`; the record's `fields`, if any; `exception` with the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line.update({str(key): value for key, value in fields.items() if key not in line and value is not None})
        if record.exc_info:
            line["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, default=str)


def log_as_json(stream: TextIO | None = None) -> None:
    """Send everything from `info` upwards to `stream` (default: stderr) as JSON, and nothing anywhere else."""
    handler = LineHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
