"""Plain single-process PyTorch, written without any code of ours: what every run is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adagrad": torch.optim.Adagrad,
}


def sample_stream(seed: int, samples: int, count: int) -> list[int]:
    """The documented data order: epoch e reads samples by ascending raw output of Philox(key=[seed, e])."""
    stream: list[int] = []
    epoch = 0
    while len(stream) < count:
        keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(samples)
        stream.extend(np.argsort(keys, kind="stable").tolist())
        epoch += 1
    return stream[:count]


def train(
    build: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    data: dict[str, Tensor],
    *,
    steps: int,
    global_batch: int,
    micro_batch: int,
    seed: int,
    optimizer: dict[str, Any],
    clip: float | None,
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses per step and the final state dict of an ordinary training loop with gradient accumulation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(seed)
        model = build()
        model.train()
        options = {key: value for key, value in optimizer.items() if key != "name"}
        update = OPTIMIZERS[optimizer["name"]](model.parameters(), **options)
        samples = len(next(iter(data.values())))
        stream = iter(sample_stream(seed, samples, steps * global_batch))
        losses = []
        count = global_batch // micro_batch
        for _ in range(steps):
            update.zero_grad()
            total = 0.0
            for _ in range(count):
                indices = torch.tensor([next(stream) for _ in range(micro_batch)])
                loss = loss_of(model, {key: value[indices] for key, value in data.items()})
                (loss / count).backward()
                total += loss.item()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            update.step()
            losses.append(total / count)
        return losses, {key: value.detach().clone() for key, value in model.state_dict().items()}
    finally:
        torch.set_num_threads(threads)
