"""What `torch_pipeline.py` trains: the GPT of a workload on text, or the ResNet of `slow_jobs.py` on digits, in plain PyTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import Workload, load_example
from benchmarks.plain_loop import batches


class Task(ABC):
    """A model of the examples, how it is split into equal stages, its optimizer and global batches; `data` is its file."""

    name: ClassVar[str]

    def __init__(self, workload: Workload, data: Path) -> None:
        self.workload = workload
        self.data = data
        self._module = load_example(self.name)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        found: Tensor = self._module.loss(output, target)
        return found

    @abstractmethod
    def build(self) -> nn.Module: ...

    @abstractmethod
    def example(self) -> Tensor:
        """The input of one micro-batch."""

    @abstractmethod
    def splits(self, stages: int) -> list[str]:
        """The modules with which the second and later stages begin."""

    @abstractmethod
    def optimizer(self, stage: nn.Module) -> torch.optim.Optimizer: ...

    @abstractmethod
    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of each step."""


class Gpt(Task):
    """The workload itself."""

    name = "gpt"

    def build(self) -> nn.Module:
        model: nn.Module = self._module.build(**self.workload.model_args)
        return model

    def example(self) -> Tensor:
        return torch.zeros(self.workload.micro_batch, self.workload.sequence_length, dtype=torch.int64)

    def splits(self, stages: int) -> list[str]:
        return [f"blocks.{index * self.workload.layers // stages}" for index in range(1, stages)]

    def optimizer(self, stage: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(stage.parameters(), lr=3e-4)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(self.workload, self.data)


class Resnet(Task):
    """Of the workload only the batch and the steps; four stages at most, as the model has."""

    name = "resnet"

    def build(self) -> nn.Module:
        model: nn.Module = self._module.build(depth=18, channels=1, classes=10, width=16)
        return model

    def example(self) -> Tensor:
        return self._images()[: self.workload.micro_batch]

    def splits(self, stages: int) -> list[str]:
        return [f"stages.{index * 4 // stages}" for index in range(1, stages)]

    def optimizer(self, stage: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(stage.parameters(), lr=0.05, momentum=0.9)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, classes = self._images(), torch.from_numpy(np.load(self.data)["targets"])
        generator = torch.Generator().manual_seed(0)
        order = torch.randint(len(images), (self.workload.steps, self.workload.global_batch), generator=generator)
        for chosen in order:
            yield images[chosen], classes[chosen]

    def _images(self) -> Tensor:
        return torch.from_numpy(np.load(self.data)["inputs"])


TASKS: dict[str, type[Task]] = {task.name: task for task in (Gpt, Resnet)}
