"""How fast the codecs encode and decode on one core, and how many bytes they save.

`python benchmarks/codecs.py`. Gaussian float32 values; rates are bytes of the tensor per second. Beside top-k stands a bare
`torch.topk` over the same tensor, which only finds the values and writes nothing; beside all of them a plain copy, which is
about what the machine's memory lets through at that moment.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import Sample, arguments, child_environment, interleave, machine, report
from compress.kernels import KERNELS

CODECS = (
    "bf16",
    "int8",
    "int4",
    "int4:stochastic=1",
    "int3:stochastic=1",
    "int2:stochastic=1",
    "topk-sampled:ratio=100",
    "topk-sampled:ratio=10",
    "topk:ratio=100",
    "topk:ratio=10",
    "topk-reused:ratio=100",
)
BARE = "torch.topk"
COPY = "copy"
SIZES = (1 << 18, 1 << 20, 1 << 22)
"""Values in a tensor: activations of 1, 4 and 16 MiB."""
SECONDS = 0.4
"""How long each measurement lasts."""
TARGETS = {"int8": 4e9, "int4": 2e9, "topk-sampled:ratio=100": 2e9}
"""Bytes per second that encoding should reach."""
TIMES_TOPK = 10
"""How many times faster than `torch.topk` sampled top-k at 1% should encode."""


@dataclass(frozen=True)
class Rates:
    """Bytes of the tensor per second; `payload` is the number of bytes on the wire."""

    encode: float
    decode: float
    payload: int


def measured(name: str, elements: int) -> Rates:
    """Runs in a process of its own, so that every codec starts with the same memory."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, "--elements", str(elements)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return Rates(**json.loads(done.stdout.strip().splitlines()[-1]))


def child(name: str, elements: int) -> None:
    import torch

    import compress

    torch.set_num_threads(1)
    # Several tensors in turn: a real one was not encoded a moment ago.
    tensors = [torch.randn(elements, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    if name == BARE:
        rate = best_rate(lambda turn: tensors[turn % 4].abs().topk(elements // 100, sorted=False), 4 * elements)
        print(json.dumps({"encode": rate, "decode": 0.0, "payload": 0}))
        return
    if name == COPY:
        out = torch.empty(elements)
        rate = best_rate(lambda turn: out.copy_(tensors[turn % 4]), 4 * elements)
        print(json.dumps({"encode": rate, "decode": 0.0, "payload": 0}))
        return
    codec = compress.codec(name)
    places: list[compress.Places | None] = [None] * 4
    if codec.needs_places:
        kept = compress.codec(name.replace("reused", "sampled"))
        places = [kept.places(kept.encode(tensor), (elements,), "float32") for tensor in tensors]
    whole = [bytes(codec.encode(tensor, seed, places[seed])) for seed, tensor in enumerate(tensors)]
    payloads = [payload[len(had.head) if had else 0 :] for payload, had in zip(whole, places, strict=True)]

    def encode(turn: int) -> object:
        return codec.encode(tensors[turn % 4], turn, places[turn % 4])

    def decode(turn: int) -> object:
        return codec.decode(payloads[turn % 4], (elements,), "float32", places[turn % 4])

    rates = {
        "encode": best_rate(encode, 4 * elements),
        "decode": best_rate(decode, 4 * elements),
        "payload": len(payloads[0]),
    }
    print(json.dumps(rates))


def best_rate(run: Callable[[int], object], size: int) -> float:
    """Bytes per second of processor time, the median call."""
    for turn in range(4):
        run(turn)
    seconds = []
    until, turn = perf_counter() + SECONDS, 0
    while perf_counter() < until or turn < 5:
        begin = thread_time()
        run(turn)
        seconds.append(thread_time() - begin)
        turn += 1
    return size / Sample(tuple(seconds)).median


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--child", metavar="CODEC", help="measure one codec in this process (the program calls itself)")
    parser.add_argument("--elements", type=int, help="only tensors of so many values")
    options = parser.parse_args()
    if options.child:
        child(options.child, options.elements)
        return
    about = machine()
    rows: list[list[str]] = []
    results: list[dict[str, object]] = []
    for elements in SIZES if options.elements is None else (options.elements,):
        variants = {name: partial(measured, name, elements) for name in (COPY, *CODECS, BARE)}
        taken, disturbed = interleave(variants, options.rounds, options.repeats)
        bare, copy = (Sample(tuple(rates.encode for rates in taken.pop(name))) for name in (BARE, COPY))
        for name, rates in taken.items():
            encode = Sample(tuple(one.encode for one in rates))
            decode = Sample(tuple(one.decode for one in rates))
            times = encode.median / bare.median
            payload = rates[0].payload
            target = f"{TARGETS[name] / 1e9:.0f} GB/s" if name in TARGETS else ""
            if name == "topk-sampled:ratio=100":
                target += f", {TIMES_TOPK}x"
            rows.append(
                [
                    f"{name}, {elements * 4 >> 20} MiB",
                    f"{encode.median / 1e9:.2f}",
                    encode.spread(1e-9, 2),
                    target,
                    f"{decode.median / 1e9:.2f}",
                    f"{4 * elements / payload:.1f}",
                    f"{times:.1f}" if name.startswith("topk") else "",
                    f"{encode.median / copy.median:.2f}",
                ]
            )
            results.append(
                {
                    "codec": name,
                    "elements": elements,
                    "cores_taken_by_others": disturbed,
                    "encode_bytes_per_second": encode.values,
                    "decode_bytes_per_second": decode.values,
                    "wire_ratio": 4 * elements / payload,
                    "torch_topk_bytes_per_second": bare.values,
                    "times_torch_topk": times,
                    "copy_bytes_per_second": copy.values,
                    "share_of_copy": encode.median / copy.median,
                }
            )
    report(
        "codecs",
        "Codecs on one core, float32",
        [
            "codec, tensor",
            "encode GB/s",
            "range",
            "target",
            "decode GB/s",
            "wire ratio",
            "times torch.topk",
            "of a copy",
        ],
        rows,
        {
            "machine": about,
            "kernels_in_c": KERNELS is not None,
            "targets": {**TARGETS, "times_torch_topk": TIMES_TOPK},
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
