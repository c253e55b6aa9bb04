"""The plots of docs/benchmarks.md, as SVG with text that stays text. The same results give the same bytes, on any processor."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.codec_harm import DENSE, STARTS
from benchmarks.page.tables import recorded, slow_rows
from benchmarks.slow_rows import Row
from benchmarks.slow_settings import ALL_TAKE_PART, FAST, HEADLINE, SETTINGS

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e7ec",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_PLANS = {
    "torch, alternating": ("torch's pipelining, alternating ranks", "#9aa5b1", "s"),
    "torch, grouped": ("torch's pipelining, grouped ranks", "#5b6775", "s"),
    "ours: equal-ops, dense": ("equal-ops, dense", "#d9a05b", "^"),
    "ours: equal-compute, int8": ("equal-compute, int8", "#b9772f", "v"),
    "ours: equal-ops, top-k 1/100": ("equal-ops, top-k 1/100 (at a worse loss)", "#c2410c", "x"),
    "ours: op-fence, dense": ("op-fence, dense", "#7fb08d", "o"),
    f"ours: {ALL_TAKE_PART.name}": ("op-fence, auto, all take part", "#5a8bd8", "o"),
    f"ours: {HEADLINE.name}": ("op-fence, auto (default)", "#1d4ed8", "D"),
}
"""Name of a row -> label, colour, marker. The others are in the tables."""
_FAMILIES = {"top-k": "#c2410c", "AdaTopK": "#b9772f", "int": "#1d4ed8", "bf16": "#4d9a63"}

_SHAPE = re.compile(r"(?<=[\"#])[pmC][0-9a-f_]{10,}(?=[\")])")


@contextmanager
def _figure(width: float, height: float, columns: int = 1, **options: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(
            1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
        )
        try:
            yield figure, list(axes[0])
        finally:
            pyplot.close(figure)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return _numbered("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def _numbered(svg: str) -> str:
    """Its shapes numbered in their order: matplotlib names them after figures whose last bits differ between processors."""
    names: defaultdict[str, str] = defaultdict(lambda: f"shape-{len(names)}")
    return _SHAPE.sub(lambda found: names[found[0]], svg)


def slow_network() -> str:
    """Step time between two cities over the rate of the link between them, for the plans worth comparing."""
    rows = slow_rows("gpt")
    settings = [name for name in ("8", "20", "100", FAST) if any(name in of for of in rows.values())]
    with _figure(8, 4.6) as (figure, (axes,)):
        for name, (label, colour, marker) in _PLANS.items():
            known = [(at, rows[name][setting]) for at, setting in enumerate(settings) if setting in rows.get(name, {})]
            axes.errorbar(
                [at for at, _ in known],
                [row.seconds for _, row in known],
                yerr=list(zip(*(_spread(row) for _, row in known), strict=True)) or None,
                label=label,
                color=colour,
                marker=marker,
                capsize=2,
            )
        axes.set_yscale("log")
        axes.set_yticks([0.3, 0.5, 1, 2, 5, 10], ["0.3", "0.5", "1", "2", "5", "10"])
        axes.minorticks_off()
        axes.set_xticks(
            range(len(settings)), [SETTINGS[setting].title.removeprefix("two cities, ") for setting in settings]
        )
        axes.set_ylabel("seconds per step")
        axes.set_title("GPT over two cities", loc="left")
        figure.legend(loc="outside right upper", fontsize=9)
        return _svg(figure)


def _spread(row: Row) -> tuple[float, float]:
    """Down to the quickest round and up to the slowest."""
    rounds = row.rounds or (row.seconds,)
    return row.seconds - min(rounds), max(rounds) - row.seconds


def codec_harm() -> str:
    """How much worse the loss gets over how many times fewer bytes, one panel for each start."""
    rows = recorded("codec_harm")["rows"]
    starts = [start for start in STARTS if f"gpt, {start}, {DENSE}" in rows]
    with _figure(4.2 * len(starts) + 1.6, 4.2, max(1, len(starts)), sharey=True) as (figure, panels):
        for axes, start in zip(panels, starts, strict=True):
            dense = rows[f"gpt, {start}, {DENSE}"]["loss"]
            for name, row in rows.items():
                prefix, codec = f"gpt, {start}, ", name.removeprefix(f"gpt, {start}, ").rpartition(", ")[0]
                if not name.startswith(prefix) or not codec:
                    continue
                one = name.endswith(", 1 boundaries")
                colour = next((shade for family, shade in _FAMILIES.items() if codec.startswith(family)), "#5b6775")
                harm = 100 * (row["loss"] / dense - 1)
                axes.plot(
                    row["ratio"], harm, "o" if one else "D", color=colour, markerfacecolor="white" if one else colour
                )
                axes.annotate(codec, (row["ratio"], harm), xytext=(5, 3), textcoords="offset points", fontsize=7)
            axes.axhline(1, color="#4d9a63", linewidth=1, linestyle="--")
            axes.set_xscale("log")
            axes.set_yscale("symlog", linthresh=1)
            axes.set_yticks([0, 1, 2, 5, 10, 20, 50, 100], ["0", "1%", "2%", "5%", "10%", "20%", "50%", "100%"])
            axes.set_xticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
            axes.minorticks_off()
            axes.margins(x=0.3)
            axes.set_xlabel("times fewer bytes on a boundary")
            axes.set_title(f"GPT, {STARTS[start]}", loc="left", fontsize=10)
        panels[0].set_ylabel("loss over dense (filled: 3 boundaries, hollow: 1)")
        return _svg(figure)


def prediction() -> str:
    """Predicted over measured step time, every setting a point."""
    settings = recorded("prediction")["settings"]
    with _figure(5, 4.6) as (figure, (axes,)):
        ends = [0.8 * min(each["measured"] for each in settings), 1.25 * max(each["measured"] for each in settings)]
        axes.fill_between(
            ends, [0.9 * end for end in ends], [1.1 * end for end in ends], color="#e5efe8", label="within 10%"
        )
        for kind, colour, marker in (("planned", "#b9772f", "x"), ("calibrated", "#1d4ed8", "o")):
            label = {"planned": "as planned", "calibrated": "calibrated"}[kind]
            points = [(each["measured"], each[kind]) for each in settings]
            axes.plot(*zip(*points, strict=True), marker, color=colour, label=label, linestyle="none")
        for scale in (axes.set_xscale, axes.set_yscale):
            scale("log")
        for ticks in (axes.set_xticks, axes.set_yticks):
            ticks([0.3, 0.5, 1, 2, 3], ["0.3", "0.5", "1", "2", "3"])
        axes.minorticks_off()
        axes.set_xlabel("measured seconds per step")
        axes.set_ylabel("predicted")
        axes.legend()
        return _svg(figure)


def recovery() -> str:
    """Seconds from `kill -9` to the next completed step, per network and way to recover."""
    kinds: dict[str, tuple[str, Callable[[Any], list[float]]]] = {
        "adoption and replay": ("#1d4ed8", lambda found: [loss["next_step"] for loss in found["adoptions"]]),
        "heavy rescheduling": ("#d9a05b", lambda found: found["heavy_rescheduling_seconds"]),
        "restart from a checkpoint": ("#9aa5b1", lambda found: [loss["next_step"] for loss in found["restarts"]]),
    }
    results = [recorded(f"recovery_{index}")["results"][0] for index in range(3)]
    with _figure(6.4, 3.4) as (figure, (axes,)):
        for shift, (label, (colour, values_of)) in enumerate(kinds.items()):
            values = [values_of(found) for found in results]
            middle = [median(each) for each in values]
            spread = [
                [mid - min(each) for mid, each in zip(middle, values, strict=True)],
                [max(each) - mid for mid, each in zip(middle, values, strict=True)],
            ]
            places = [at + 0.27 * (shift - 1) for at in range(len(results))]
            axes.bar(places, middle, 0.25, yerr=spread, capsize=2, color=colour, ecolor="#5b6775", label=label)
        axes.set_yscale("log")
        axes.set_yticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
        axes.minorticks_off()
        axes.grid(axis="x", visible=False)
        axes.set_xticks(range(len(results)), [found["setting"] for found in results])
        axes.set_ylabel("seconds to the next step")
        axes.legend(loc="upper left", fontsize=9)
        return _svg(figure)
