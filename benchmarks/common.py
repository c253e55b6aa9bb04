"""What the benchmarks share: fair environments, interleaved runs, medians with their spread, tables and JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import pydoc_data.topics
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from types import ModuleType
from typing import Any, TypeVar

import psutil
from rich.console import Console
from rich.table import Table

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GPT = ROOT / "examples" / "models" / "gpt.py"

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "FUSION_THREADS": "1",
}
"""Every process of both sides computes with one thread and does not spin while it waits."""


@dataclass(frozen=True)
class Workload:
    """A GPT on text: what both sides of a comparison train."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    vocabulary: int = 256
    sequence_length: int = 64
    micro_batch: int = 2
    micro_batches: int = 4
    steps: int = 80
    warm_up: int = 20
    """Steps at the start that are not counted."""

    @property
    def model_args(self) -> dict[str, int]:
        names = ("layers", "width", "heads", "vocabulary", "sequence_length")
        return {name: getattr(self, name) for name in names}

    @property
    def global_batch(self) -> int:
        return self.micro_batch * self.micro_batches

    def describe(self) -> str:
        return (
            f"GPT of {self.layers} layers, width {self.width}, sequence {self.sequence_length}, "
            f"{self.micro_batches} micro-batches of {self.micro_batch}"
        )

    def job(self, text: Path, **plan: object) -> dict[str, object]:
        """The job spec of this workload."""
        return {
            "name": "benchmark",
            "model": {"entrypoint": f"{GPT}:build", "args": self.model_args},
            "loss": {"entrypoint": f"{GPT}:loss"},
            "data": {"text": str(text), "tokenizer": "bytes", "sequence_length": self.sequence_length},
            "train": {
                "steps": self.steps,
                "global_batch": self.global_batch,
                "micro_batch": self.micro_batch,
                "optimizer": {"name": "adamw", "lr": 3.0e-4},
            },
            "plan": plan,
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Workload:
        return Workload(**json.loads(text))


def write_text(folder: Path) -> Path:
    """English text that every CPython carries."""
    path = folder / "topics.txt"
    path.write_text("\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    return path


def load_example(name: str) -> ModuleType:
    """A model of the examples as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", GPT.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_gpt() -> ModuleType:
    """The example GPT as a module."""
    return load_example("gpt")


def child_environment() -> dict[str, str]:
    return {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)}


def seconds_per_step(step_seconds: Sequence[float], workload: Workload) -> float:
    """The mean over the counted steps: unlike a median it does not depend on how time is put down to single steps."""
    return mean(step_seconds[workload.warm_up :])


def peak_memory(process_id: int | str = "self") -> int:
    """Largest resident set of a process so far, in bytes.

    From `/proc`, not from `getrusage`, which after `exec` still counts the parent's memory.
    """
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark needs Linux's /proc")


def run_child(script: str, *arguments: str, timeout: float = 600) -> dict[str, Any]:
    """Run a benchmark's helper program; its last line of output is JSON."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{script} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


@dataclass(frozen=True)
class Sample:
    """The runs of one variant."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    def spread(self, scale: float = 1.0, digits: int = 1) -> str:
        return f"{min(self.values) * scale:.{digits}f}..{max(self.values) * scale:.{digits}f}"


class Disturbance:
    """How many cores other programs (and the hypervisor) took since this was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._before = self._foreign_seconds()

    def cores(self) -> float:
        elapsed = time.perf_counter() - self._began
        return max(0.0, (self._foreign_seconds() - self._before) / elapsed)

    @staticmethod
    def _foreign_seconds() -> float:
        """Busy seconds of the machine without those of this process and its descendants."""
        whole = psutil.cpu_times()
        busy = sum(whole) - whole.idle - getattr(whole, "iowait", 0.0) - getattr(whole, "guest", 0.0)
        own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        for child in psutil.Process().children(recursive=True):
            try:
                own += sum(child.cpu_times()[:4])  # with its own children that have ended
            except psutil.NoSuchProcess:
                continue  # it ended this moment: its time is in RUSAGE_CHILDREN once it is waited for
        return float(busy - own)


DISTURBED = 0.15
"""A run during which others took more cores than this is run again."""


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="repeat a run that other programs disturbed so often")
    return parser


def interleave(variants: Mapping[str, Callable[[], T]], rounds: int, repeats: int) -> tuple[dict[str, list[T]], float]:
    """Run every variant once a round, in an order that changes from round to round, so that drift hits all alike.

    A run that other programs disturbed is repeated up to `repeats` times; of these the least disturbed counts. Returns the
    results, and the cores that others took in the worst run that counts.
    """
    results: dict[str, list[T]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(0).shuffle
    worst = 0.0
    for index in range(rounds):
        shuffle(order)
        for name in order:
            tries: list[tuple[float, T]] = []
            while not tries or (min(cores for cores, _ in tries) > DISTURBED and len(tries) <= repeats):
                disturbance = Disturbance()
                result = variants[name]()
                tries.append((disturbance.cores(), result))
                print(
                    f"round {index + 1}/{rounds} {name}: others took {tries[-1][0]:.2f} cores",
                    file=sys.stderr,
                    flush=True,
                )
            cores, result = min(tries, key=lambda pair: pair[0])
            worst = max(worst, cores)
            results[name].append(result)
    return results, round(worst, 2)


def ratios(ours: Sequence[float], baseline: Sequence[float]) -> Sample:
    """Ours over the baseline, round by round."""
    return Sample(tuple(own / other for own, other in zip(ours, baseline, strict=True)))


def machine() -> dict[str, object]:
    """What a reader needs to know of the machine."""
    import torch
    import zmq

    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyzmq": zmq.__version__,
        "load_before": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(
    name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], data: Mapping[str, object]
) -> None:
    """Print the table and write `benchmarks/results/NAME.json`."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(data, indent=2) + "\n")
    print(f"written to {path.relative_to(ROOT)}")
