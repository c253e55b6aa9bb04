"""Looks for a codec that costs at most 2% of the loss at 16 times fewer bytes, the model unchanged: what was tried, what came out.

`python benchmarks/codec_trials.py`. The GPT of `codec_harm.py` (4 layers, width 128, sequence 128, batch 16 in micro-batches of
4) is trained from scratch for 300 steps by a plain loop, with the trial's quantizers where fragments would meet: after blocks
1, 2 and 3, or after block 2 alone. None of these quantizers is in the product. Each row is written when it is done, and what is
there is not run again.

A trial rounds to a grid, evenly spaced, nearest or stochastic, and differs in what comes before and after:

- *blocks*: one grid for 64 values, as wide as the largest of them, as the product's integer codecs have it;
- *rows*: one grid for a token's 128 values, its spacing a share of their root mean square, to an eighth of an octave; nothing is
  clipped;
- *rotated*: each row is multiplied by a Hadamard matrix first;
- *predicted*: both ends keep running means of what was received, by token and by position, and the difference to their sum is sent;
  *predicted by 2*: by the token before, too;
- *Huffman*: the codes go through zlib's Huffman coding, several to a byte where they are few. The loss is the same with and
  without; both sizes are told.

Bytes count codes and scales (16 bits for a block, 8 for a row) of both directions, of every tenth step.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ONE_THREAD

os.environ.update(ONE_THREAD)  # before torch is loaded

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import loss_curves
from benchmarks.common import RESULTS, load_gpt, write_text
from benchmarks.page.blocks import table
from benchmarks.rows_file import RowsFile

LAYERS, WIDTH, SEQUENCE, MICRO_BATCH, MICRO_BATCHES, WARM_UP = 4, 128, 128, 4, 4, 20
GOAL_HARM, GOAL_RATIO = 0.02, 16.0
COUNTED_EVERY = 10


@dataclass(frozen=True)
class Grid:
    """How one direction is rounded. With `levels` to either side of 0 it is by blocks, with `spacing` (in root mean squares) by rows."""

    levels: int | None = None
    spacing: float | None = None
    stochastic: bool = False
    rotated: bool = False

    def __str__(self) -> str:
        size = f"{2 * self.levels + 1} levels" if self.levels is not None else f"rows at {self.spacing:g} rms"
        return size + (" stochastic" if self.stochastic else "") + (" rotated" if self.rotated else "")


@dataclass(frozen=True)
class Trial:
    forward: Grid | None = None
    backward: Grid | None = None
    predicted: int = 0
    """By the means of so many tokens: its own, and the one before."""
    boundaries: int = 3

    @property
    def name(self) -> str:
        if self.forward is None:
            return "dense"
        predicted = ("", ", predicted", ", predicted by 2")[self.predicted]
        how = f"{self.forward}{predicted} / {self.backward}"
        return f"{how}, {self.boundaries} {'boundary' if self.boundaries == 1 else 'boundaries'}"


INT4, INT3, INT2 = (Grid(levels=2 ** (bits - 1) - 1) for bits in (4, 3, 2))
STOCHASTIC_3, STOCHASTIC_2 = (Grid(levels=levels, stochastic=True) for levels in (3, 1))


def rows(spacing: float, **options: bool) -> Grid:
    return Grid(spacing=spacing, **options)


TRIALS = (
    Trial(),
    *(
        Trial(forward, backward, predicted, boundaries)
        for boundaries in (1, 3)
        for forward, backward, predicted in (
            (INT4, STOCHASTIC_3, 0),
            (INT4, STOCHASTIC_2, 0),
            (INT3, STOCHASTIC_2, 0),
            (rows(0.5), STOCHASTIC_2, 0),
            (rows(0.75), STOCHASTIC_2, 0),
            (rows(0.75, rotated=True), STOCHASTIC_2, 0),
            (rows(0.75), STOCHASTIC_2, 1),
            (rows(0.5), rows(1.5, stochastic=True), 1),
            (rows(0.75), rows(2.0, stochastic=True), 1),
            (rows(1.0), rows(2.0, stochastic=True), 1),
            (rows(0.75), rows(2.0, stochastic=True), 2),
            (rows(1.0), rows(2.0, stochastic=True), 2),
        )
    ),
)


class Sizes:
    """Bits that crossed, per value: as codes of a fixed width, and after Huffman coding."""

    def __init__(self) -> None:
        self.values = self.plain = self.coded = 0

    def count(self, codes: Tensor, scales: int, levels: int | None) -> None:
        """`scales` in bits."""
        whole = codes.flatten().to(torch.int64)
        top = int(whole.abs().max()) if whole.numel() else 0
        width = 2 * (top if levels is None else levels) + 1
        self.values += whole.numel()
        self.plain += math.ceil(whole.numel() * math.log2(max(width, 2))) + scales
        self.coded += 8 * _huffman((whole + top).numpy(), 2 * top + 1) + scales


def _huffman(codes: np.ndarray[Any, Any], width: int) -> int:
    """Bytes of codes below `width`; several share a byte where they fit, as Huffman coding spends a bit on each symbol at least."""
    if width > 256:
        data = codes.astype(np.int16).tobytes()
    else:
        together = max(1, int(math.log(256) / math.log(max(width, 2))))
        padded = np.pad(codes, (0, -len(codes) % together)).reshape(-1, together)
        data = (padded @ (width ** np.arange(together))).astype(np.uint8).tobytes()
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return len(packer.compress(data) + packer.flush())


_HADAMARD = torch.ones(1, 1)
while len(_HADAMARD) < WIDTH:
    _HADAMARD = torch.cat([torch.cat([_HADAMARD, _HADAMARD], 1), torch.cat([_HADAMARD, -_HADAMARD], 1)])
_HADAMARD /= math.sqrt(WIDTH)


def quantized(value: Tensor, grid: Grid, noise: torch.Generator, sizes: Sizes | None) -> Tensor:
    """What the other end gets of `value`, (..., WIDTH)."""
    sent = value @ _HADAMARD if grid.rotated else value
    if grid.levels is not None:
        blocks = sent.reshape(-1, 64)
        spacing, bits = (blocks.abs().amax(1, keepdim=True) / grid.levels).bfloat16().float().clamp_min(1e-30), 16
    else:
        assert grid.spacing is not None
        blocks = sent.reshape(-1, WIDTH)
        size = blocks.pow(2).mean(1, keepdim=True).sqrt().clamp(2.0**-24, 2.0**7)
        spacing, bits = grid.spacing * torch.exp2((8 * torch.log2(size)).round() / 8), 8
    shift = torch.rand(blocks.shape, generator=noise) if grid.stochastic else 0.5
    codes = (blocks / spacing + shift).floor()
    if grid.levels is not None:
        codes = codes.clamp(-grid.levels, grid.levels)  # The scale was rounded.
    if sizes is not None:
        sizes.count(codes, bits * len(blocks), grid.levels)
    got = (codes * spacing).reshape(sent.shape)
    return got @ _HADAMARD.T if grid.rotated else got


class Means:
    """What both ends expect of an activation before it comes: running means of what came, by position and by `tokens` tokens."""

    def __init__(self, vocabulary: int, tokens: int) -> None:
        self.means = [torch.zeros(vocabulary, WIDTH) for _ in range(tokens)]
        self.seen = [torch.zeros(vocabulary, 1) for _ in range(tokens)]
        self.position = torch.zeros(SEQUENCE, WIDTH)

    def expect(self, tokens: Tensor) -> Tensor:
        return sum((mean[tokens.roll(back, 1)] for back, mean in enumerate(self.means)), self.position)

    def learn(self, tokens: Tensor, got: Tensor) -> None:
        """Means over the last ten messages or so; a token's first ones count in full. Each explains what the others leave."""
        for back, (mean, seen) in enumerate(zip(self.means, self.seen, strict=True)):
            of = tokens.roll(back, 1).flatten()  # The first position has the last token before it: as good as none.
            counts = torch.zeros(len(mean), 1).index_add_(0, of, torch.ones(len(of), 1))
            rest = (got - self.expect(tokens)).reshape(-1, WIDTH)
            sums = torch.zeros_like(mean).index_add_(0, of, rest)
            seen += counts
            here = counts[:, 0] > 0
            rate = (counts / seen.clamp(max=10 * counts.clamp_min(1)))[here].clamp(max=1)
            mean[here] += rate * (sums / counts.clamp_min(1))[here]
        self.position += 0.1 * (got - self.expect(tokens)).mean(0)


class Boundary:
    """Stands where two fragments meet."""

    def __init__(self, trial: Trial, vocabulary: int, seed: int) -> None:
        self.trial = trial
        self.means = Means(vocabulary, trial.predicted) if trial.predicted else None
        self.noise = torch.Generator().manual_seed(seed)
        self.tokens = torch.empty(0, dtype=torch.int64)
        self.sizes: Sizes | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert self.trial.forward is not None
        assert self.trial.backward is not None
        expected = self.means.expect(self.tokens) if self.means is not None else 0.0
        exact = output.detach()
        got = expected + quantized(exact - expected, self.trial.forward, self.noise, self.sizes)
        if self.means is not None:
            self.means.learn(self.tokens, got)
        received = output + (got - exact)  # The value is what came, the gradient passes.
        backward, sizes = self.trial.backward, self.sizes
        received.register_hook(lambda gradient: quantized(gradient, backward, self.noise, sizes))
        return received


def train(trial: Trial, text: bytes, steps: int, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    began = time.perf_counter()
    letters = torch.tensor(list(text))
    model = load_gpt().build(layers=LAYERS, width=WIDTH, heads=4, vocabulary=256, sequence_length=SEQUENCE)
    after = {1: (1,), 3: (0, 1, 2)}[trial.boundaries] if trial.forward is not None else ()
    boundaries = [Boundary(trial, 256, 100 * seed + index) for index in after]
    for index, boundary in zip(after, boundaries, strict=True):
        model.blocks[index].register_forward_hook(boundary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sizes, losses = Sizes(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / WARM_UP)
        draw = torch.Generator().manual_seed(1_000_000 * seed + step)
        total = 0.0
        for _ in range(MICRO_BATCHES):
            at = torch.randint(len(letters) - SEQUENCE - 1, (MICRO_BATCH,), generator=draw)
            samples = torch.stack([letters[start : start + SEQUENCE + 1] for start in at.tolist()])
            for boundary in boundaries:
                boundary.tokens, boundary.sizes = samples[:, :-1], None if step % COUNTED_EVERY else sizes
            logits = model(samples[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten()) / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    bits = {"plain": sizes.plain / sizes.values, "coded": sizes.coded / sizes.values} if sizes.values else {}
    return {
        "loss": loss_curves.last(losses),
        "ratio": {kind: round(32 / each, 2) for kind, each in bits.items()},
        "seconds": round(time.perf_counter() - began),
    }


def report(*runs: RowsFile) -> Iterator[str]:
    """Markdown. With several `runs`, one for each seed, the harm is that with each."""
    lines = []
    for trial in TRIALS:
        having = [found for found in runs if trial.name in found and "dense" in found]
        if not having:
            continue
        harms = [found[trial.name]["loss"] / found["dense"]["loss"] - 1 for found in having]
        ratios = [found[trial.name]["ratio"] for found in having]
        sizes = [f"{ratios[0][kind]:.1f}" for kind in ("plain", "coded")] if ratios[0] else ["1.0", ""]
        kept = trial.forward is not None and max(harms) <= GOAL_HARM
        reached = kept and min(ratio["coded"] for ratio in ratios) >= GOAL_RATIO
        losses = [f"{found[trial.name]['loss']:.3f}" for found in having]
        over_dense = [f"{harm:+.1%}" for harm in harms] if trial.forward is not None else []
        lines.append([trial.name, *sizes, ", ".join(losses), ", ".join(over_dense), "yes" if reached else ""])
    yield table(["forward / gradients", "fewer bytes", "with Huffman", "loss", "over dense", "both goals"], lines)


def runs() -> list[RowsFile]:
    """What is recorded, the first seed first."""
    return [RowsFile(path, {}) for path in sorted(RESULTS.glob("codec_trials*.json"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and rounding")
    parser.add_argument("--results", type=Path, help="default: a file of its own in the folder of results")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", default=[""], help="trials with one of these in their name"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    options = parser.parse_args()
    name = "codec_trials" if not options.seed else f"codec_trials_seed_{options.seed}"
    found = RowsFile(options.results or RESULTS / f"{name}.json", {"steps": options.steps, "torch": torch.__version__})
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder)).read_bytes()
    for trial in () if options.table else TRIALS:
        if trial.name not in found and any(each in trial.name for each in options.only):
            found.add(trial.name, train(trial, text, options.steps, options.seed))
            print(f"{trial.name}: {found[trial.name]}", file=sys.stderr, flush=True)
    print("\n".join(report(found)))


if __name__ == "__main__":
    main()
