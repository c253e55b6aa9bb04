"""Uploads fragments' states, the parts of which the coordinator makes a checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

from pydantic import BaseModel
from torch import Tensor

from fusion.messages import CheckpointPart, Warned
from worker.jobs.explain import explain
from worker.jobs.fetch import Fetcher
from worker.jobs.state_blob import StateBlob


class PartUploads:
    """Those of one job. Made in the event loop, in which uploads run; `epoch` is that of the plan that is followed."""

    def __init__(self, job: str, fetcher: Fetcher, send: Callable[[BaseModel], None], epoch: Callable[[], int]) -> None:
        self._job = job
        self._fetcher = fetcher
        self._send = send
        self._epoch = epoch
        self._loop = asyncio.get_running_loop()

    def begin(self, step: int, fragment: int, state: dict[str, Tensor]) -> Future[None]:
        """Upload the state after `step` and announce it; from any thread. A failure is a warning: training goes on."""
        return asyncio.run_coroutine_threadsafe(self._upload(step, fragment, state), self._loop)

    async def _upload(self, step: int, fragment: int, state: dict[str, Tensor]) -> None:
        try:
            blob = await self._fetcher.upload(StateBlob(state))
        except Exception as error:
            self._send(
                Warned(
                    job=self._job,
                    message=f"could not upload fragment {fragment} of the checkpoint at step {step}: {explain(error)}; "
                    "training goes on",
                )
            )
            return
        self._send(CheckpointPart(job=self._job, epoch=self._epoch(), step=step, fragment=fragment, blob=blob))
