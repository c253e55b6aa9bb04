"""Random samples of a given shape, made when they are read: for plans and timings, which look at shapes only."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch.utils.data import Dataset


class Noise(Dataset[tuple[torch.Tensor, torch.Tensor]], ABC):
    """`samples` pairs; sample i is always the same."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index >= self.samples:
            raise IndexError(index)
        return self.sample(torch.Generator().manual_seed(index))

    @abstractmethod
    def sample(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """One pair, with no other randomness than the generator's."""


class Tokens(Noise):
    def __init__(self, samples: int, length: int, vocabulary: int) -> None:
        super().__init__(samples)
        self.length, self.vocabulary = length, vocabulary

    def sample(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.randint(self.vocabulary, (self.length + 1,), generator=generator)
        return text[:-1], text[1:]


class Images(Noise):
    def __init__(self, samples: int, size: int, channels: int, classes: int) -> None:
        super().__init__(samples)
        self.shape, self.classes = (channels, size, size), classes

    def sample(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(self.shape, generator=generator), torch.randint(self.classes, (), generator=generator)


def tokens(samples: int = 1024, length: int = 1024, vocabulary: int = 50257) -> Tokens:
    return Tokens(samples, length, vocabulary)


def images(samples: int = 1024, size: int = 224, channels: int = 3, classes: int = 1000) -> Images:
    return Images(samples, size, channels, classes)
