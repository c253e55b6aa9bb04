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


@pytest.mark.parametrize("join", ["ftp://h", "http://[::1?token=secret", "http://h:99999?token=secret"])
def test_not_an_address(join: str) -> None:
    with pytest.raises(UserError, match=r"not a coordinator's address|the port is not a number") as caught:
        WorkerConfig(join=join)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["a b", "-a", "a\n", "\u00e9", 65 * "a"])
def test_a_name_is_checked_before_anything_is_measured(name: str) -> None:
    with pytest.raises(UserError, match="is not a worker's name: up to 64 letters") as caught:
        WorkerConfig(join="http://h", name=name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("join", ["http://h?token=sec%0Aret", "http://h"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(join: str) -> None:
    with pytest.raises(UserError, match="copy it again") as caught:
        WorkerConfig(join=join, token="sec ret")
    assert "ret" not in str(caught.value)
