"""Helper of `overhead.py`: the training loop that anyone would write, with micro-batches, in one process.

`python plain_loop.py WORKLOAD_JSON TEXT` prints JSON: step times, losses, processor time per step and the process's peak memory in bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Workload, load_gpt, peak_memory


def batches(workload: Workload, text: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets (global batch, sequence) of each step."""
    tokens = torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8).to(torch.int64)
    length = workload.sequence_length
    samples = (len(tokens) - 1) // length
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(samples, (workload.steps, workload.global_batch), generator=generator)
    for chosen in order:
        windows = torch.stack([tokens[sample * length : (sample + 1) * length + 1] for sample in chosen.tolist()])
        yield windows[:, :-1], windows[:, 1:]


def main() -> None:
    workload, text = Workload.from_json(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    gpt = load_gpt()
    torch.manual_seed(0)
    model = gpt.build(**workload.model_args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    times, losses, processor = [], [], []
    before = time.perf_counter()
    for inputs, targets in batches(workload, text):
        loss_sum = 0.0
        for micro_inputs, micro_targets in zip(
            inputs.split(workload.micro_batch), targets.split(workload.micro_batch), strict=True
        ):
            loss = gpt.loss(model(micro_inputs), micro_targets)
            (loss / workload.micro_batches).backward()
            loss_sum += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum / workload.micro_batches)
        now = time.perf_counter()
        times.append(now - before)
        processor.append(time.process_time())
        before = now
    cpu_seconds = (processor[-1] - processor[workload.warm_up - 1]) / (workload.steps - workload.warm_up)
    print(
        json.dumps({"step_seconds": times, "losses": losses, "cpu_seconds": cpu_seconds, "peak_bytes": peak_memory()})
    )


if __name__ == "__main__":
    main()
