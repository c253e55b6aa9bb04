"""A U-Net (Ronneberger et al. 2015) that labels every pixel; a skip joins each level of the way down to the way up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    def __init__(self, channels: int, classes: int, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.stem = DoubleConv(channels, widths[0])
        self.down = nn.ModuleList(DoubleConv(widths[level], widths[level + 1]) for level in range(levels))
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(widths[level + 1], widths[level], 2, stride=2) for level in reversed(range(levels))
        )
        self.up = nn.ModuleList(DoubleConv(2 * widths[level], widths[level]) for level in reversed(range(levels)))
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> logits (batch, classes, height, width)."""
        x = self.stem(images)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat([skips.pop(), grow(x)], dim=1))
        return self.head(x)


def build(channels: int = 1, classes: int = 2, width: int = 16, levels: int = 3) -> nn.Module:
    """Height and width of the images must be multiples of 2 ** levels."""
    return UNet(channels, classes, width, levels)


def loss(output: Tensor, targets: Tensor) -> Tensor:
    """Targets (batch, height, width): the class of each pixel."""
    return F.cross_entropy(output, targets)
