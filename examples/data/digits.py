"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels in 17 grey levels, ten classes."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset, TensorDataset


def dataset(size: int = 8) -> Dataset[tuple[torch.Tensor, ...]]:
    """Images (1, size, size) float32 in 0..1 and int64 labels; `size` is a multiple of 8, pixels are repeated."""
    if size % 8:
        raise ValueError(f"size must be a multiple of 8, not {size}")
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).unsqueeze(1) / 16
    images = images.repeat_interleave(size // 8, dim=2).repeat_interleave(size // 8, dim=3)
    return TensorDataset(images, torch.from_numpy(digits.target).to(torch.int64))
