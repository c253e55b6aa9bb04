"""The states that checkpoints are made of: taken after the updates that are due for one, uploaded when nobody waits for them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Set
from concurrent.futures import Future

from torch import Tensor

from fusion.messages import TrainConfig

Upload = Callable[[int, int, dict[str, Tensor]], "Future[None]"]
"""(step, fragment, state) -> done when the part is at the coordinator, or was given up with a warning."""


class CheckpointParts:
    """Those of one worker's fragments. Used by the compute thread alone; `uploaded` is called from another one."""

    def __init__(self, train: TrainConfig, upload: Upload, uploaded: Callable[[], None]) -> None:
        self._train = train
        self._upload = upload
        self._uploaded = uploaded
        self._under_way: list[Future[None]] = []
        self._held: dict[int, tuple[int, dict[str, Tensor]]] = {}
        """Fragment -> (step, state) of what is not being uploaded yet."""

    @property
    def settled(self) -> bool:
        """Whether every part that was taken has been uploaded, or given up."""
        return not self._held and all(upload.done() for upload in self._under_way)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is made of the states after `step`."""
        every = self._train.checkpoint_every
        return step == self._train.steps or bool(every and step % every == 0)

    def take(self, fragment: int, step: int, state: dict[str, Tensor]) -> None:
        """Hold the state after `step`; one that is held already is uploaded now."""
        self.upload([fragment])
        self._held[fragment] = step, state

    def upload_but(self, replaying: Set[int]) -> None:
        """Hashing and sending take what a replay, for which everybody waits, could compute with: so those wait."""
        self.upload(set(self._held) - replaying)

    def upload(self, fragments: Collection[int]) -> None:
        """What is held of these fragments."""
        for fragment in fragments:
            if (held := self._held.pop(fragment, None)) is not None:
                upload = self._upload(held[0], fragment, held[1])
                upload.add_done_callback(lambda _: self._uploaded())
                self._under_way = [*(upload for upload in self._under_way if not upload.done()), upload]
