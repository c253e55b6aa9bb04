"""One run on this machine from spec to checkpoint: what `fusion up` and `fusion.train` share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from http.client import CONFLICT
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.client import Client, StreamItem
from fusion.errors import CoordinatorError, JobFailedError, UserError
from fusion.local import LocalPool, check_done

if TYPE_CHECKING:
    from fusion.submit import CapturedJob


@dataclass(frozen=True)
class Run:
    """How a run ended."""

    job: dict[str, Any]
    """As the coordinator describes it."""
    checkpoint: Path
    """Folder with `model.safetensors` and `optimizer.safetensors`."""
    seconds: float
    """From the job's submission to its end."""


def run_folder(name: str, state: Path | None = None, parent: Path = Path("fusion-runs")) -> Path:
    """`state`, or a fresh `fusion-runs/NAME-TIMESTAMP`. Raises `UserError`."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = state if state is not None else parent / f"{name}-{stamp}"
    attempt = 1
    try:
        while state is None:
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                attempt += 1
                folder = parent / f"{name}-{stamp}-{attempt}"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't make the run's folder: {error.strerror or error}; give --state DIR") from None
    return folder


def train_on(
    pool: LocalPool,
    capture: Callable[[], CapturedJob],
    *,
    show: Callable[[StreamItem], None],
    say: Callable[[str], None],
    remark: Callable[[str], None],
    resume: str | None = None,
) -> Run:
    """Capture while the workers start, submit, watch to the end and fetch the last checkpoint.

    `say` hears what happens now, `remark` what should stay to be read. Raises `UserError` from the capture, `ServiceError` from
    the pool, `JobFailedError` when the job does not end well.
    """
    job = capture()
    with pool.client() as client:
        _give_up_earlier_jobs(client, pool.folder, remark)
    say("waiting for the workers")
    pool.wait_for_workers()
    # Imported late: this needs torch, and the workers import theirs at the same time.
    from fusion.submit import remarks_on, submit

    for line in remarks_on(job):
        remark(line)
    with pool.client() as client:
        began = time.monotonic()
        posted = submit(client, job, resume=resume, say=say)
        final = pool.watch(str(posted["id"]), show)
        seconds = time.monotonic() - began
        check_done(final)
        _check_kept(final, pool.folder)
        target = pool.folder / "checkpoint"
        target.mkdir(exist_ok=True)
        for part in ("model", "optimizer"):
            client.download_checkpoint(
                str(posted["id"]), int(final["checkpoint"]), part, target / f"{part}.safetensors"
            )
    return Run(final, target, seconds)


def _check_kept(job: dict[str, Any], folder: Path) -> None:
    """Raise `JobFailedError` unless there is a checkpoint of the last step: an older one is not what was trained."""
    kept, last = job["checkpoint"], job["steps"]
    if kept != last:
        there = "there is none" if kept is None else f"the newest is of step {kept}"
        raise JobFailedError(
            f"job {job['id']} is trained, but no checkpoint of its last step {last} could be kept: {there}; is the disk of "
            f"{folder} full?"
        )


def _give_up_earlier_jobs(client: Client, folder: Path, remark: Callable[[str], None]) -> None:
    """Cancel what an interrupted run has left in this folder: the coordinator would take it up, and this run's job wait for it."""
    for job in client.jobs():
        if job["state"] in ("done", "failed", "cancelled"):
            continue
        try:
            # It may have gone on since it was listed, so that older checkpoints are there no more; or have ended.
            left = client.cancel(str(job["id"]))
        except CoordinatorError as error:
            if error.status != CONFLICT:
                raise
            continue
        told = f"job {left['id']} of an earlier run in this folder is given up after step {left['step']} of {left['steps']}"
        if left["checkpoint"] is not None:
            kept = folder / "state" / "checkpoints" / str(left["id"]) / str(left["checkpoint"])
            told += f"; its last checkpoint, for `fusion up --resume`, is {kept}"
        remark(told)
