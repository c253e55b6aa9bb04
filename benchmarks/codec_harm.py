"""What lossy codecs on a model's boundaries do to its loss: every codec and ratio, from scratch and from a dense checkpoint.

`python benchmarks/codec_harm.py`. The loss depends on the plan and not on the network, so none is used: `one_process.py` runs
the fragments with the plan's codecs in this process, and has the bits of a pool (`tests/system/test_exactness.py`). A row takes
a minute and a half of one core. Each is written as soon as it is done, and what is there is not run again: stop it at will.

- *Boundaries*: one cuts the model in two halves of equal work, three in four quarters, always where a single value crosses.
- *From scratch*: 300 steps on all of the text, or of the digits. *Fine-tuned*: 300 steps, at a lower rate, on the second half of them
  from a checkpoint of 600 dense steps on the first half (of the digits: other people's handwriting).
- *Loss*: the mean of the last 20 steps. *Held out*: of a tenth of the samples that is not trained on, with the codecs as in training,
  and without any.
- *AdaTopK* follows the links of two cities with 8 Mbit/s between them: the middle boundary gets the highest ratio.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ONE_THREAD

os.environ.update(ONE_THREAD)  # before torch is loaded

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import loss_curves, slow_jobs, topologies
from benchmarks.common import RESULTS, write_text
from benchmarks.one_process import OneProcess, Step
from benchmarks.rows_file import Row, RowsFile
from dag.graph import OpDag
from dag.workload import workload
from fusion.plan import Plan
from fusion.spec import CompressionSpec
from fusion.submit import CapturedJob
from scheduler import from_topology, plan_job

SCRATCH, TUNED = "scratch", "fine-tuned"
STARTS = {SCRATCH: "from scratch", TUNED: "fine-tuned from a dense checkpoint"}
BOUNDARIES = {1: ("a-1", "b-1"), 3: ("a-1", "a-2", "b-1", "b-2")}
"""How many: the workers that AdaTopK takes the fragments to be on."""
GENTLE: dict[str, dict[str, Any]] = {
    "gpt": {"optimizer": {"name": "adamw", "lr": 3.0e-4}},
    "resnet": {"optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9}},
}
"""For fine-tuning."""
BATCH: dict[str, dict[str, Any]] = {"gpt": {"global_batch": 16}, "resnet": {}}
"""Half the yardstick's for the GPT, so that a row takes a minute and a half of one core."""
TITLES = {"gpt": "GPT of 4 layers, width 128, sequence 128, batch 16", "resnet": "ResNet-18 of width 16, batch 64"}
PRETRAINING = 2
"""Times the steps of a row."""
EVALUATED = 16
"""Micro-batches of held-out samples."""
DENSE = "none"


@dataclass(frozen=True)
class Tried:
    """A codec, as a job spec asks for it."""

    name: str
    compression: dict[str, Any]


def _topk(ratio: float) -> list[Tried]:
    plain = {"codec": "topk", "ratio": ratio, "backward": "topk"}
    return [
        Tried(f"top-k 1/{ratio:g}", plain),
        Tried(f"top-k 1/{ratio:g}, error feedback", {**plain, "error_feedback": True}),
        Tried(f"top-k 1/{ratio:g}, gradients at its places", {"codec": "topk", "ratio": ratio}),
        Tried(
            f"top-k 1/{ratio:g}, gradients at its places, error feedback",
            {"codec": "topk", "ratio": ratio, "error_feedback": True},
        ),
    ]


def _adatopk(ratio: float) -> list[Tried]:
    plain = {"codec": "adatopk", "ratio": ratio}
    return [
        Tried(f"AdaTopK {ratio:g}", {**plain, "backward": "topk"}),
        Tried(f"AdaTopK {ratio:g}, gradients at its places", plain),
    ]


def _places(ratio: float) -> Tried:
    """Top-k with values of 8 bits, and gradients at the places of the activations: the gradient of what was sent."""
    return Tried(
        f"top-k 1/{ratio:g} of 8 bits, gradients at its places",
        {"forward": f"topk:ratio={ratio:g},value_bits=8", "backward": "topk-reused:value_bits=8"},
    )


TRIED = (
    Tried(DENSE, {"codec": "none"}),
    Tried("bf16", {"codec": "bf16"}),
    Tried("int8", {"codec": "int8"}),
    Tried("int4", {"codec": "int4"}),
    Tried("int8, gradients int4 stochastic", {"forward": "int8", "backward": "int4:stochastic=1"}),
    Tried("int8, gradients int3 stochastic", {"forward": "int8", "backward": "int3:stochastic=1"}),
    Tried("int4, gradients int8", {"forward": "int4", "backward": "int8"}),
    Tried("int4, gradients int3 stochastic", {"forward": "int4", "backward": "int3:stochastic=1"}),
    Tried("int4, gradients int2 stochastic", {"forward": "int4", "backward": "int2:stochastic=1"}),
    *map(_places, (4, 6, 8, 10, 20)),
    *_topk(10),
    *_topk(30),
    *_topk(100),
    *_adatopk(10),
    *_adatopk(100),
)


@dataclass(frozen=True)
class Case:
    """One row; without codec nothing depends on the boundaries."""

    model: str
    start: str
    tried: Tried
    boundaries: int

    @property
    def name(self) -> str:
        where = "" if self.tried.name == DENSE else f", {self.boundaries} boundaries"
        return f"{self.model}, {self.start}, {self.tried.name}{where}"


def cases(models: Sequence[str], starts: Sequence[str], boundaries: Sequence[int], only: Sequence[str]) -> list[Case]:
    """Every case once, the most telling ones first."""
    found = [
        Case(model, start, tried, count)
        for count in sorted(boundaries, reverse=True)
        for start in starts
        for model in models
        for tried in TRIED
    ]
    return [case for case in {case.name: case for case in found}.values() if any(text in case.name for text in only)]


def even_cuts(dag: OpDag, fragments: int) -> tuple[int, ...]:
    """Positions that split the work about evenly, each where one activation crosses and nothing else."""
    work = workload(dag)
    done = work.flops + work.backward_flops
    single = np.array([at for at in work.positions if len(work.crossings((int(at),))) == 1])
    wanted = done[-1] * np.arange(1, fragments) / fragments
    return tuple(sorted({int(single[np.abs(done[single] - share).argmin()]) for share in wanted}))


def plan_of(job: CapturedJob, case: Case) -> Plan:
    """The plan that a pool would get for these cuts, with the codecs of the case."""
    names = BOUNDARIES[case.boundaries]
    devices, network = from_topology(topologies.two_cities(8.0))
    return plan_job(
        job.dag,
        [device for device in devices if device.name in names],
        network,
        policy="equal-ops",
        micro_batches=job.spec.train.micro_batches,
        optimizer=job.spec.train.optimizer,
        compression=CompressionSpec(**case.tried.compression),
        cuts=even_cuts(job.dag, len(names)),
        use_all=True,
    )


class Bench:
    """Runs cases; keeps dense checkpoints in `checkpoints`."""

    def __init__(self, steps: int, text: Path, folder: Path, checkpoints: Path, stamp: str) -> None:
        self._steps = steps
        self._text = text
        self._folder = folder
        self._checkpoints = checkpoints
        self._stamp = stamp

    def run(self, case: Case) -> Row:
        began = time.perf_counter()
        job, tensors = self._start(case)
        plan = plan_of(job, case)
        process, steps = OneProcess(job, plan, tensors), list[Step]()
        process.train(steps.append)
        losses = [step.loss for step in steps]
        return {
            "ratio": round(sum(step.raw_bytes for step in steps) / sum(step.sent_bytes for step in steps), 2),
            "codecs": [f"{choice.forward}/{choice.backward} {choice.options or ''}" for choice in plan.codecs.values()],
            "loss": loss_curves.last(losses),
            "held_out": round(process.evaluations[self._steps], 5),
            "held_out_without_codecs": round(process.evaluate_without_codecs(), 5),
            "curve": loss_curves.curve(losses),
            "seconds": round(time.perf_counter() - began),
        }

    def _start(self, case: Case) -> tuple[CapturedJob, dict[str, Tensor] | None]:
        if case.start == SCRATCH:
            return self._job(case.model, slice(None)), None
        return self._job(case.model, slice(0.5, None), **GENTLE[case.model]), self._dense(case.model)

    def _dense(self, model: str) -> dict[str, Tensor]:
        """A checkpoint of dense training on the first half; made where there is none yet."""
        file = self._checkpoints / f"{model}-{PRETRAINING * self._steps}-{self._stamp}-{torch.__version__}.safetensors"
        if not file.exists():
            job = self._job(model, slice(None, 0.5), PRETRAINING)
            process = OneProcess(job, plan_of(job, Case(model, SCRATCH, TRIED[0], 1)))
            process.train(lambda step: None)
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            save_file({name: value.contiguous() for name, value in process.weights().items()}, file)
        return load_file(file)

    def _job(self, model: str, part: slice, times: int = 1, **train: Any) -> CapturedJob:
        data = {**slow_jobs.data_of(model, self._folder, part, self._text), "holdout": 0.1}
        steps = times * self._steps
        evaluation = {"eval_every": steps, "eval_batches": EVALUATED}
        return slow_jobs.captured(model, data, steps, **evaluation, **BATCH[model], **train)


def tables(rows: RowsFile, models: Sequence[str], starts: Sequence[str]) -> Iterator[str]:
    """Markdown: one table for each model and start that has rows."""
    for model in models:
        for start in starts:
            dense = Case(model, start, TRIED[0], 1).name
            lines = [
                line
                for tried in TRIED
                for count in BOUNDARIES
                if (line := _line(rows, Case(model, start, tried, count), dense)) is not None
            ]
            if lines:
                yield f"{TITLES[model]}, {STARTS[start]}:\n"
                yield "| codec | boundaries | fewer bytes | loss | over dense | held out | the same, codecs off |"
                yield "|---|---|---|---|---|---|---|"
                yield from dict.fromkeys(lines)
                yield ""


def _line(rows: RowsFile, case: Case, dense: str) -> str | None:
    if case.name not in rows:
        return None
    row = rows[case.name]
    over = f"{row['loss'] / rows[dense]['loss'] - 1:+.1%}" if dense in rows and case.name != dense else ""
    where = "" if case.tried.name == DENSE else str(case.boundaries)
    cells = (
        case.tried.name,
        where,
        f"{row['ratio']:.1f}",
        f"{row['loss']:.3f}",
        over,
        f"{row['held_out']:.3f}",
        f"{row['held_out_without_codecs']:.3f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=slow_jobs.MODELS, default=list(slow_jobs.MODELS))
    parser.add_argument("--starts", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--boundaries", nargs="+", type=int, choices=list(BOUNDARIES), default=list(BOUNDARIES))
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[""], help="rows with one of these in their name")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--text", type=Path, help="train the GPT on this; default: English text that every CPython has")
    parser.add_argument("--results", type=Path, default=RESULTS / "codec_harm.json")
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "fusion-codec-harm")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = options.text or write_text(folder)
        stamp = hashlib.sha256(text.read_bytes()).hexdigest()[:12]
        made_with = {"steps": options.steps, "text": stamp, "torch": torch.__version__}
        rows = RowsFile(options.results, {} if options.table else made_with)
        bench = Bench(options.steps, text, folder, options.checkpoints, stamp)
        for case in [] if options.table else cases(options.models, options.starts, options.boundaries, options.only):
            if case.name not in rows:
                rows.add(case.name, bench.run(case))
                row = rows[case.name]
                print(f"{case.name}: {row['loss']:.4f}, {row['seconds']} s", file=sys.stderr, flush=True)
    print("\n".join(tables(rows, options.models, options.starts)))


if __name__ == "__main__":
    main()
