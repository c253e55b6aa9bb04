"""What it costs to compute the gradients of weights apart from the rest of a backward, as gradients that wait are.

`python benchmarks/split_backward.py`. The fragment in the middle of a model runs its tasks again and again in this process, in
turn with whole backwards and with both halves. Nothing waits and nobody is waited for: this is the price, which a plan pays
where a step gets shorter for it. Beside it stands what the cost model (`scheduler.cost`) expects on this machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import thread_time
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Disturbance, machine, report, write_text
from benchmarks.lone_fragment import FRAGMENTS, MODELS, LoneFragment, quarters
from dag.workload import workload
from fusion.submit import capture_job, read_job
from scheduler import Costs, Device, Network, measured
from worker.machine.profile import profile

WARM_UP = 3


@dataclass(frozen=True)
class Split:
    """One fragment's micro-batch, in processor seconds: medians of each round."""

    model: str
    ops: int
    """Whose weights' gradients can wait."""
    whole: tuple[float, ...]
    """Forward and backward."""
    apart: tuple[float, ...]
    expected: float
    """Ratio of both, by the cost model."""

    @property
    def ratios(self) -> list[float]:
        return [apart / whole for apart, whole in zip(self.apart, self.whole, strict=True)]


def step(lone: LoneFragment, number: int, postpone: bool) -> float:
    """Median processor seconds of its micro-batches, forward and back."""
    program, seconds = lone.program, []
    for micro_batch in range(lone.micro_batches):
        begin = thread_time()
        program.forward(number, micro_batch, lone.arrivals, lone.data, postpone=postpone)
        program.backward(number, micro_batch, lone.gradients)
        while program.weights(number, micro_batch):
            pass
        seconds.append(thread_time() - begin)
    program.update(number, None)
    return median(seconds)


def measure(name: str, spec: Mapping[str, Any], device: Device, rounds: int) -> Split:
    job = capture_job(*read_job({**spec, "train": {**spec["train"], "steps": rounds + WARM_UP}}))
    cuts, index = quarters(job), FRAGMENTS // 2
    lone = LoneFragment(job, cuts, index)
    taken: dict[bool, list[float]] = {True: [], False: []}
    for number in range(1, rounds + WARM_UP + 1):
        for postpone in (False, True):
            taken[postpone].append(step(lone, number, postpone))
    work = workload(job.dag)
    costs = Costs(work, (device,), Network(), "1f1b", lone.micro_batches, job.spec.train.optimizer)
    span = cuts[index - 1], cuts[index]
    # Without what a task costs beside its operators, which here has no messages.
    both = costs.times(device).both
    return Split(
        name,
        len(lone.fragment.postponed),
        *(tuple(taken[postpone][WARM_UP:]) for postpone in (False, True)),
        1 + costs.splitting_seconds(device, *span) / float(both[span[1]] - both[span[0]]),
    )


def this_machine() -> Device:
    found = profile(torch.device("cpu"), 1, 1.0)
    return measured(
        "here",
        found.flops_per_second,
        convolution_speed=found.convolution_flops_per_second,
        bytes_per_second=found.bytes_per_second,
        training_share=found.training_share,
        seconds_per_call=found.seconds_per_call,
        convolution_share=found.convolution_share,
        seconds_per_convolution=found.seconds_per_convolution,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about, disturbance, device = machine(), Disturbance(), this_machine()
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        splits = [measure(name, spec(text), device, options.rounds) for name, spec in MODELS.items()]
    rows = [
        [
            split.model,
            str(split.ops),
            f"{median(split.whole) * 1e3:.2f}",
            f"{median(split.apart) * 1e3:.2f}",
            f"{median(split.ratios):.3f}",
            f"{min(split.ratios):.2f}..{max(split.ratios):.2f}",
            f"{split.expected:.3f}",
        ]
        for split in splits
    ]
    report(
        "split_backward",
        f"Processor ms of a micro-batch in the third of {FRAGMENTS} fragments; others took {disturbance.cores():.2f} cores",
        ["model", "ops", "whole", "apart", "ratio", "range", "cost model"],
        rows,
        {
            "machine": about,
            "splits": [
                {
                    "model": split.model,
                    "ops": split.ops,
                    "whole_seconds": median(split.whole),
                    "apart_seconds": median(split.apart),
                    "ratio": median(split.ratios),
                    "range": [min(split.ratios), max(split.ratios)],
                    "expected_ratio": split.expected,
                }
                for split in splits
            ],
        },
    )


if __name__ == "__main__":
    main()
