"""Writes the tables and plots of docs/benchmarks.md from the results that are recorded, which other programs here measure.

`python benchmarks/publish.py`; with `--check` it only says what is out of date (exit code 1). What stands in the page between
two comments that name this program is made here, as are the pictures; the words around them are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT
from benchmarks.page import plots, tables
from benchmarks.page.blocks import filled
from benchmarks.slow_settings import CITIES, FAST, SLOW_MOTION

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "images"
OTHERS = ("home-devices", "one-bad-link")

BLOCKS: dict[str, Callable[[], str]] = {
    "recovery": tables.recovery,
    "recovery-equal-cuts": partial(tables.recovery, "equal"),
    "chaos": tables.chaos,
    "prediction": tables.prediction,
    "slow-network-seconds": partial(tables.slow_table, "gpt", (*CITIES, FAST), tables.seconds),
    "slow-network-bytes": partial(tables.slow_table, "gpt", (*CITIES, FAST), tables.sent),
    "slow-motion-seconds": partial(tables.slow_table, "gpt", SLOW_MOTION, tables.seconds_over_bound),
    "other-networks-seconds": partial(tables.slow_table, "gpt", OTHERS, tables.seconds),
    "slow-network-goals": partial(tables.slow_goals, "gpt"),
    "slow-network-losses": partial(tables.losses, "gpt"),
    "resnet-seconds": partial(tables.slow_table, "resnet", (*CITIES, FAST, *OTHERS), tables.seconds),
    "resnet-goals": partial(tables.slow_goals, "resnet"),
    "codec-harm": tables.harm,
    "paper-scale-gpus": partial(tables.paper_scale, "48 GPUs"),
    "paper-scale-devices": partial(tables.paper_scale, "1,000 devices"),
    "codec-trials": tables.trials,
}
PLOTS: dict[str, Callable[[], str]] = {
    "slow-network.svg": plots.slow_network,
    "codec-harm.svg": plots.codec_harm,
    "prediction.svg": plots.prediction,
    "recovery-times.svg": plots.recovery,
}


def made() -> dict[Path, str]:
    """Every file that is made here, with its text."""
    files = {PICTURES / name: draw() for name, draw in PLOTS.items()}
    return {PAGE: filled(PAGE.read_text(encoding="utf-8"), BLOCKS), **files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, say what is out of date")
    check = parser.parse_args().check
    stale = [
        (path, text) for path, text in made().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")
    if check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path, _ in stale)
        print(f"out of date: {names}. Run `make docs` and commit.", file=sys.stderr)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
