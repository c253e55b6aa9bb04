"""Structured logs: one JSON object a line, with fields and traceback, and without any token."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from fusion.errors import UserError
from fusion.logs import JsonFormatter, redact
from worker.config import WorkerConfig


def line(message: str, *args: object, **more: object) -> dict[str, object]:
    record = logging.LogRecord("coordinator.http.api", logging.INFO, "f", 1, message, args, more.get("exc_info"))  # type: ignore[arg-type]
    record.created = 0.25
    if "fields" in more:
        record.fields = more["fields"]
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return dict(json.loads(text))


def test_a_line_holds_what_a_collector_needs():
    shown = line("worker %s joined", "a", fields={"event": "worker-joined", "job": None, "message": "not this"})
    assert shown == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "info",
        "logger": "coordinator.http.api",
        "message": "worker a joined",
        "event": "worker-joined",
    }


def test_a_traceback_is_one_field():
    try:
        raise ValueError("http://x?token=hidden&more=1")
    except ValueError:
        shown = line("failed", exc_info=sys.exc_info())
    assert "ValueError: http://x?token=...&more=1" in str(shown["exception"])


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("--join 'http://h:1?token=SECRET'", "--join 'http://h:1?token=...'"),
        ("https://h:1/?x=1&token=SECRET&cert=SECRET y", "https://h:1/?x=1&token=...&cert=... y"),
        ("Authorization: Bearer SECRET-12", "Authorization: Bearer ..."),
        ("the bearer token is wrong", "the bearer token is wrong"),
    ],
)
def test_tokens_are_taken_out(text, kept):
    assert redact(text) == kept


def test_a_wrong_join_url_is_told_without_its_token():
    with pytest.raises(UserError, match="is not a coordinator's address") as caught:
        _ = WorkerConfig("ftp://h?token=SECRET-12").coordinator
    assert "SECRET" not in str(caught.value)
