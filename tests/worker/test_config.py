"""What a worker reads from its join URL."""

from __future__ import annotations

import pytest

from fusion.errors import UserError
from worker.config import WorkerConfig


@pytest.mark.parametrize(
    "join", ["http://h:7077?token=abc", "'http://h:7077?token=abc'", "http://h:7077/?token=abc'", " h:7077?token=abc"]
)
def test_a_join_url_gives_address_and_token_however_it_was_copied(join: str) -> None:
    config = WorkerConfig(join=join)
    assert config.coordinator == "http://h:7077"
    assert config.bearer == "abc"


def test_a_separate_token_fills_in() -> None:
    assert WorkerConfig(join="http://h:7077", token="t").bearer == "t"


def test_not_an_address() -> None:
    with pytest.raises(UserError, match="not a coordinator's address"):
        _ = WorkerConfig(join="ftp://h").coordinator
