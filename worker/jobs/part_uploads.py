"""Uploads fragments' states, the parts of which the coordinator makes a checkpoint.

While the coordinator is away, the newest state of each fragment waits for it; so the last one is never lost. While the
coordinator has no room it does so too, for some minutes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic

from pydantic import BaseModel
from torch import Tensor

from fusion.errors import CoordinatorError, UnreachableError
from fusion.messages import BlobRef, CheckpointPart, Warned
from worker.jobs.explain import explain
from worker.jobs.fetch import Fetcher
from worker.jobs.state_blob import StateBlob

_AGAIN_SECONDS = 2.0
_NO_ROOM = 507
_NO_ROOM_PATIENCE = 300.0

log = logging.getLogger("fusion.worker")


class PartUploads:
    """Those of one job. Made in the event loop, in which uploads run.

    `epoch` is that of the plan that is followed; nothing waits any more once the job is `over`.
    """

    def __init__(
        self,
        job: str,
        fetcher: Fetcher,
        send: Callable[[BaseModel], None],
        epoch: Callable[[], int],
        over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._job = job
        self._fetcher = fetcher
        self._send = send
        self._epoch = epoch
        self._loop = asyncio.get_running_loop()
        self._over = over
        self._newest: dict[int, int] = {}

    def begin(self, step: int, fragment: int, state: dict[str, Tensor]) -> Future[None]:
        """Upload the state after `step` and announce it; from any thread. A failure is a warning: training goes on."""
        return asyncio.run_coroutine_threadsafe(self._upload(step, fragment, state), self._loop)

    async def _upload(self, step: int, fragment: int, state: dict[str, Tensor]) -> None:
        self._newest[fragment] = step
        try:
            blob = await self._keep_trying(step, fragment, StateBlob(state))
        except Exception as error:
            self._warn(step, fragment, error, "training goes on")
            return
        if blob is None:
            log.info(
                "fragment %d of the checkpoint at step %d was not uploaded: a newer one takes its place", fragment, step
            )
            return
        self._send(CheckpointPart(job=self._job, epoch=self._epoch(), step=step, fragment=fragment, blob=blob))

    async def _keep_trying(self, step: int, fragment: int, blob: StateBlob) -> BlobRef | None:
        """The uploaded blob; None when a newer state has come meanwhile, or the job is over."""
        full_since: float | None = None
        while self._newest[fragment] == step and not self._over():
            try:
                return await self._fetcher.upload(blob)
            except UnreachableError:
                pass
            except CoordinatorError as error:
                if error.status != _NO_ROOM or (full_since and monotonic() - full_since > _NO_ROOM_PATIENCE):
                    raise
                if full_since is None:
                    full_since = monotonic()
                    self._warn(step, fragment, error, "it is tried again; training goes on")
            await asyncio.sleep(_AGAIN_SECONDS)
        return None

    def _warn(self, step: int, fragment: int, error: Exception, then: str) -> None:
        what = f"could not upload fragment {fragment} of the checkpoint at step {step}: {explain(error)}; {then}"
        self._send(Warned(job=self._job, message=what))
