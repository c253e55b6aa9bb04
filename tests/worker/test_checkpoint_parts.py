"""Parts of checkpoints: which steps are due, what waits for a replay, and when all is settled."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from fusion.messages import TrainConfig
from fusion.spec import LrScheduleSpec, OptimizerSpec
from worker.jobs.checkpoint_parts import CheckpointParts


class Coordinator:
    """Takes parts, and says when each is there."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, int]] = []
        self.uploads: list[Future[None]] = []

    def upload(self, step: int, fragment: int, state: dict[str, Tensor]) -> Future[None]:
        self.parts.append((step, fragment))
        self.uploads.append(Future())
        return self.uploads[-1]


TRAIN = TrainConfig(
    steps=6,
    micro_batches=2,
    micro_batch_size=4,
    seed=0,
    optimizer=OptimizerSpec(name="sgd", lr=0.1),
    lr_schedule=LrScheduleSpec(name="constant"),
)
STATE = {"weight": torch.ones(1)}


@pytest.mark.parametrize(
    ("every", "due"), [(None, [6]), (0, [6]), (2, [2, 4, 6]), (4, [4, 6])], ids=["none", "zero", "even", "last too"]
)
def test_the_steps_of_checkpoints_and_the_last_one_are_due(every: int | None, due: list[int]) -> None:
    train = TRAIN.model_copy(update={"checkpoint_every": every})
    parts = CheckpointParts(train, Coordinator().upload, lambda: None)
    assert [step for step in range(1, TRAIN.steps + 1) if parts.due(step)] == due


def test_a_part_of_a_replay_waits_for_its_end() -> None:
    coordinator, told = Coordinator(), list[None]()
    parts = CheckpointParts(TRAIN, coordinator.upload, lambda: told.append(None))
    assert parts.settled
    parts.take(0, 2, STATE)
    parts.take(1, 2, STATE)
    parts.upload_but({1})
    assert coordinator.parts == [(2, 0)]
    coordinator.uploads[0].set_result(None)
    assert len(told) == 1
    assert not parts.settled, "fragment 1 is held"
    parts.upload_but(set())
    assert coordinator.parts == [(2, 0), (2, 1)]
    assert not parts.settled, "fragment 1 is under way"
    coordinator.uploads[1].set_result(None)
    assert parts.settled
    assert len(told) == 2


def test_no_part_is_lost_to_a_newer_one_or_a_move() -> None:
    coordinator = Coordinator()
    parts = CheckpointParts(TRAIN, coordinator.upload, lambda: None)
    parts.take(0, 2, STATE)
    parts.take(0, 4, STATE)
    assert coordinator.parts == [(2, 0)]
    parts.upload({0, 1})
    assert coordinator.parts == [(2, 0), (4, 0)]
