"""One run on this machine: its end is no success without the weights of its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusion.errors import CoordinatorError, JobFailedError
from fusion.runs import Run, train_on
from fusion.spec import LrScheduleSpec
from fusion.submit import remarks_on


def captured(*notes: str, **schedule: Any) -> Any:
    """What is looked at of a captured job before it is submitted."""
    train = SimpleNamespace(lr_schedule=LrScheduleSpec(**schedule))
    return SimpleNamespace(dag=SimpleNamespace(notes=notes), spec=SimpleNamespace(train=train))


def trained(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: int | None,
    remarks: list[str] | None = None,
    earlier: Sequence[dict[str, Any]] = (),
    cancel: Callable[[str], dict[str, Any]] = lambda _: {},
    **job: Any,
) -> tuple[Run, list[Any]]:
    """A job of ten steps that is done, and what was fetched of it."""
    fetched: list[Any] = []
    client = SimpleNamespace(
        download_checkpoint=lambda *asked: fetched.append(asked[1:3]), jobs=lambda: earlier, cancel=cancel
    )
    final = {"id": "job-1", "state": "done", "step": 10, "steps": 10, "checkpoint": checkpoint}
    pool = SimpleNamespace(
        folder=folder,
        wait_for_workers=lambda: None,
        client=lambda: nullcontext(client),
        watch=lambda job, show: final,
    )
    monkeypatch.setattr("fusion.submit.submit", lambda *_, **__: {"id": "job-1"})
    heard = {"show": lambda _: None, "say": lambda _: None, "remark": ([] if remarks is None else remarks).append}
    found = train_on(pool, lambda: captured(**job), **heard)  # type: ignore[arg-type]
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


def test_what_may_not_be_meant_so_stays_to_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    trained(tmp_path, monkeypatch, 10, said, final=0.1, warmup=20)
    assert said == [
        "note: train.lr_schedule.final changes nothing: the schedule is constant; linear or cosine would use it"
    ]


def test_remarks_on_a_job() -> None:
    assert remarks_on(captured("a branch was baked in")) == ["note: a branch was baked in"]
    assert remarks_on(captured(name="cosine", final=0.1, warmup=3)) == []
    assert remarks_on(captured(name="step", every=3, gamma=0.5)) == []
    assert [line.split()[1] for line in remarks_on(captured(name="linear", every=3, gamma=0.5))] == [
        "train.lr_schedule.every",
        "train.lr_schedule.gamma",
    ]


def test_what_an_earlier_run_has_left_is_told_as_it_is_when_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator takes such a job up at once, so that it goes on after it was listed: to its end, even."""
    left = [
        {"id": name, "state": state, "step": 8, "steps": 99, "checkpoint": 8}
        for name, state in (("over", "done"), ("on", "running"), ("just-over", "running"))
    ]

    def cancel(job: str) -> dict[str, Any]:
        if job != "on":
            raise CoordinatorError(f"job {job} is done already", 409)
        return {**left[1], "state": "cancelled", "step": 31, "checkpoint": 28}

    said: list[str] = []
    trained(tmp_path, monkeypatch, 10, said, left, cancel)
    assert said == [
        "job on of an earlier run in this folder is given up after step 31 of 99; its last checkpoint, for "
        f"`fusion up --resume`, is {tmp_path / 'state' / 'checkpoints' / 'on' / '28'}"
    ]


def test_an_earlier_run_that_cannot_be_given_up_ends_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancel(_: str) -> dict[str, Any]:
        raise CoordinatorError("nothing can be recorded", 503)

    left = [{"id": "on", "state": "running", "step": 8, "steps": 99, "checkpoint": None}]
    with pytest.raises(CoordinatorError, match="nothing can be recorded"):
        trained(tmp_path, monkeypatch, 10, [], left, cancel)
