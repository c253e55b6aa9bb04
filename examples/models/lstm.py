"""An LSTM that classifies token sequences: embedding, stacked LSTM, the mean over time, a linear head."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LstmClassifier(nn.Module):
    def __init__(
        self, vocabulary: int, width: int, layers: int, classes: int, bidirectional: bool, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(
            width,
            width,
            num_layers=layers,
            batch_first=True,
            bidirectional=bidirectional,
            dropout=dropout if layers > 1 else 0.0,
        )
        self.norm = nn.LayerNorm(width * (2 if bidirectional else 1))
        self.head = nn.Linear(width * (2 if bidirectional else 1), classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, length) -> logits (batch, classes)."""
        states, _ = self.lstm(self.embedding(tokens))
        return self.head(self.norm(states.mean(dim=1)))


def build(
    vocabulary: int = 256,
    width: int = 64,
    layers: int = 2,
    classes: int = 4,
    bidirectional: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    return LstmClassifier(vocabulary, width, layers, classes, bidirectional, dropout)


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets)
