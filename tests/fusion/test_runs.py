"""One run on this machine: its end is no success without the weights of its end."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusion.errors import JobFailedError
from fusion.runs import Run, train_on


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: int | None) -> tuple[Run, list[Any]]:
    """A job of ten steps that is done, and what was fetched of it."""
    fetched: list[Any] = []
    client = SimpleNamespace(download_checkpoint=lambda *asked: fetched.append(asked[1:3]), jobs=list)
    final = {"id": "job-1", "state": "done", "step": 10, "steps": 10, "checkpoint": checkpoint}
    pool = SimpleNamespace(
        folder=folder,
        wait_for_workers=lambda: None,
        client=lambda: nullcontext(client),
        watch=lambda job, show: final,
    )
    monkeypatch.setattr("fusion.submit.submit", lambda *_, **__: {"id": "job-1"})
    deaf = {"show": lambda _: None, "say": lambda _: None, "remark": lambda _: None}
    found = train_on(pool, lambda: None, **deaf)  # type: ignore[arg-type,return-value]
    return found, fetched


def test_the_checkpoint_of_the_last_step_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, fetched = trained(tmp_path, monkeypatch, 10)
    assert fetched == [(10, "model"), (10, "optimizer")]
    assert run.checkpoint == tmp_path / "checkpoint"


@pytest.mark.parametrize(("checkpoint", "there"), [(8, "the newest is of step 8"), (None, "there is none")])
def test_an_older_checkpoint_is_not_taken_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: int | None, there: str
) -> None:
    """As where the disk was full at the end."""
    with pytest.raises(JobFailedError, match=f"no checkpoint of its last step 10 could be kept: {there}"):
        trained(tmp_path, monkeypatch, checkpoint)
