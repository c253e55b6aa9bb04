"""ResNet-18 and ResNet-101 (He et al. 2015), with the usual stem for large images and a 3x3 one for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class _Residual(nn.Module):
    """Adds a shortcut to what `body` computes; the last batch norm starts at zero, so each block starts as identity."""

    def __init__(self, body: nn.Sequential, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))
        nn.init.zeros_(body[-1].weight)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class BasicBlock(_Residual):
    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        body = nn.Sequential(
            _conv(in_channels, channels, 3, stride),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels, 3),
            nn.BatchNorm2d(channels),
        )
        super().__init__(body, in_channels, channels, stride)


class Bottleneck(_Residual):
    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        body = nn.Sequential(
            _conv(in_channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            _conv(channels, channels, 3, stride),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            _conv(channels, 4 * channels, 1),
            nn.BatchNorm2d(4 * channels),
        )
        super().__init__(body, in_channels, 4 * channels, stride)


class ResNet(nn.Module):
    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks_per_stage: tuple[int, int, int, int],
        channels: int,
        classes: int,
        width: int,
        small: bool,
    ) -> None:
        super().__init__()
        if small:
            self.stem = nn.Sequential(_conv(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        else:
            self.stem = nn.Sequential(
                _conv(channels, width, 7, stride=2),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        stages = []
        current = width
        for stage, count in enumerate(blocks_per_stage):
            blocks = []
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(current, width * 2**stage, stride))
                current = width * 2**stage * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(current, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, channels, height, width) -> logits (batch, classes)."""
        features = self.pool(self.stages(self.stem(images)))
        return self.head(features.flatten(1))


def build(depth: int = 18, channels: int = 3, classes: int = 10, width: int = 64, small: bool = True) -> nn.Module:
    """`depth` is 18 or 101; `small` takes the stem for images of 8x8 to 64x64 pixels; `width` is that of the first stage."""
    if depth == 18:
        return ResNet(BasicBlock, (2, 2, 2, 2), channels, classes, width, small)
    if depth == 101:
        return ResNet(Bottleneck, (3, 4, 23, 3), channels, classes, width, small)
    raise ValueError(f"depth must be 18 or 101, not {depth}")


def loss(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output, targets)
