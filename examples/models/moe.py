"""A transformer with mixture-of-experts layers, densely routed: every expert sees every token, the router weighs them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=2)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(mixed.transpose(1, 2).reshape(batch, length, width))


class MixtureOfExperts(nn.Module):
    """The `active` best experts of each token share its weight; the others get exactly zero."""

    def __init__(self, width: int, experts: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.router = nn.Linear(width, experts, bias=False)
        self.rise = nn.Parameter(torch.randn(experts, width, 4 * width) * width**-0.5)
        self.fall = nn.Parameter(torch.randn(experts, 4 * width, width) * (4 * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x)
        best, chosen = scores.topk(self.active, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(dim=-1))
        hidden = F.gelu(torch.einsum("blw,ewh->bleh", x, self.rise))
        return torch.einsum("bleh,ehw,ble->blw", hidden, self.fall, weights)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, experts: int, active: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.experts_norm = nn.LayerNorm(width)
        self.experts = MixtureOfExperts(width, experts, active)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.experts(self.experts_norm(x))


class MoeTransformer(nn.Module):
    def __init__(
        self, layers: int, width: int, heads: int, experts: int, active: int, vocabulary: int, sequence_length: int
    ) -> None:
        super().__init__()
        if active > experts:
            raise ValueError(f"{active} active experts asked of {experts}")
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Parameter(torch.randn(sequence_length, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, experts, active) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (batch, length) -> logits (batch, length, vocabulary)."""
        x = self.token_embedding(tokens) + self.position_embedding[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build(
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    experts: int = 4,
    active: int = 2,
    vocabulary: int = 256,
    sequence_length: int = 128,
) -> nn.Module:
    return MoeTransformer(layers, width, heads, experts, active, vocabulary, sequence_length)


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())
