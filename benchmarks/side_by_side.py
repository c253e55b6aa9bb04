"""What it gains to replay the micro-batches of a step at the same time, where only one fragment has something to do.

`python benchmarks/side_by_side.py`. Forward and backward of all micro-batches of the third of four fragments, one after the
other as in training, and with a thread for each core as in a replay, in turn. Each thread has one of torch's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Disturbance, Sample, machine, report, write_text
from benchmarks.lone_fragment import FRAGMENTS, MODELS, LoneFragment, quarters
from executor.lanes import Lanes
from fusion.submit import capture_job, read_job
from worker.jobs.side_by_side import PER_LANE
from worker.machine import cores

WARM_UP = 5


@dataclass(frozen=True)
class Gain:
    """Seconds that the micro-batches of a step took in each round, without the update."""

    model: str
    serial: Sample
    beside: Sample

    @property
    def ratios(self) -> Sample:
        return Sample(tuple(one / many for one, many in zip(self.serial.values, self.beside.values, strict=True)))


def one_after_the_other(lone: LoneFragment, number: int) -> float:
    begin = perf_counter()
    for micro_batch in range(lone.micro_batches):
        lone.program.forward(number, micro_batch, lone.arrivals, lone.data)
        lone.program.backward(number, micro_batch, lone.gradients)
    seconds = perf_counter() - begin
    lone.program.update(number, None)
    return seconds


def side_by_side(lone: LoneFragment, number: int, lanes: Lanes) -> float:
    begin, together = perf_counter(), PER_LANE * lanes.count
    for first in range(0, lone.micro_batches, together):
        calls = [
            partial(lone.program.whole, number, micro_batch, lone.arrivals, lone.data, lone.gradients)
            for micro_batch in range(first, min(first + together, lone.micro_batches))
        ]
        for whole in lanes.run(calls):
            lone.program.add_up(whole)
    seconds = perf_counter() - begin
    lone.program.update(number, None)
    return seconds


def measure(name: str, spec: Mapping[str, Any], lanes: Lanes, rounds: int) -> Gain | None:
    """None of a model whose fragments are replayed as in training."""
    job = capture_job(*read_job({**spec, "train": {**spec["train"], "steps": rounds + WARM_UP}}))
    lone = LoneFragment(job, quarters(job), FRAGMENTS // 2)
    if not lone.program.apart:
        return None
    serial, beside = [], []
    for number in range(1, rounds + WARM_UP + 1):
        serial.append(one_after_the_other(lone, number))
        beside.append(side_by_side(lone, number, lanes))
    return Gain(name, Sample(tuple(serial[WARM_UP:])), Sample(tuple(beside[WARM_UP:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about, disturbance, lanes = machine(), Disturbance(), Lanes(cores.count(), 1)
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder))
        found = [measure(name, spec(text), lanes, options.rounds) for name, spec in MODELS.items()]
    gains = [gain for gain in found if gain is not None]
    report(
        "side_by_side",
        f"Milliseconds of a step of the third of {FRAGMENTS} fragments; others took {disturbance.cores():.2f} cores",
        ["model", "one after the other", f"{lanes.count} at a time", "ratio", "range"],
        [
            [
                gain.model,
                f"{gain.serial.median * 1e3:.1f}",
                f"{gain.beside.median * 1e3:.1f}",
                f"{median(gain.ratios.values):.2f}",
                gain.ratios.spread(digits=2),
            ]
            for gain in gains
        ],
        {
            "machine": about,
            "lanes": lanes.count,
            "gains": [
                {
                    "model": gain.model,
                    "serial_seconds": gain.serial.median,
                    "side_by_side_seconds": gain.beside.median,
                    "ratio": gain.ratios.median,
                    "range": [min(gain.ratios.values), max(gain.ratios.values)],
                }
                for gain in gains
            ],
        },
    )


if __name__ == "__main__":
    main()
