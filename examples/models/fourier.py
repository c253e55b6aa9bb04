"""A Fourier neural operator in one dimension (Li et al. 2020, figure 2): from a function on a grid to another one.

Each layer keeps the lowest `modes` frequencies and multiplies them by complex weights of its own.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SpectralConvolution(nn.Module):
    """(batch, width, points) to the same, by complex weights (width, width, modes)."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width)

    def forward(self, x: Tensor) -> Tensor:
        modes = self.weight.shape[-1]
        frequencies = torch.fft.rfft(x)
        kept = torch.einsum("bix,iox->box", frequencies[..., :modes], self.weight)
        return torch.fft.irfft(kept, n=x.shape[-1])


class FourierOperator(nn.Module):
    def __init__(self, layers: int, width: int, modes: int) -> None:
        super().__init__()
        self.lift = nn.Linear(2, width)
        self.spectral = nn.ModuleList(SpectralConvolution(width, modes) for _ in range(layers))
        self.local = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.project = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 1))

    def forward(self, values: Tensor) -> Tensor:
        """(batch, points) to (batch, points); `points` is at least twice the modes."""
        places = torch.linspace(0, 1, values.shape[-1]).expand_as(values)
        x = self.lift(torch.stack([values, places], -1)).transpose(1, 2)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            x = F.gelu(spectral(x) + local(x))
        return self.project(x.transpose(1, 2)).squeeze(-1)


def build(layers: int = 4, width: int = 32, modes: int = 12) -> nn.Module:
    return FourierOperator(layers, width, modes)


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(output, targets)
