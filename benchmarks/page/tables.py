"""The tables of docs/benchmarks.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks import codec_harm, codec_trials
from benchmarks.common import RESULTS
from benchmarks.page.blocks import table
from benchmarks.rows_file import RowsFile
from benchmarks.slow_goals import Goal, goals
from benchmarks.slow_losses import key_of, recorded_losses
from benchmarks.slow_rows import Row, measured
from benchmarks.slow_settings import ALL_TAKE_PART, HEADLINE, SETTINGS

LABELS = {
    f"ours: {HEADLINE.name}": "**op-fence, auto** (what a job gets by default)",
    f"ours: {ALL_TAKE_PART.name}": "**op-fence, auto**, all take part",
}


def recorded(name: str) -> Any:
    """What a benchmark has left in `results/NAME.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def slow_rows(model: str) -> dict[str, dict[str, Row]]:
    """Plan -> setting -> what was measured; plans and settings in the order of the benchmark."""
    found: dict[str, dict[str, Row]] = {}
    for row in measured(SETTINGS, [model]):
        found.setdefault(row.name, {})[row.setting] = row
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("ours")))


def slow_table(model: str, settings: Sequence[str], figure: Callable[[Row], str]) -> str:
    """One line for each plan, one column for each of those settings that was measured."""
    rows = slow_rows(model)
    shown = [setting for setting in settings if any(setting in of for of in rows.values())]
    lines = [
        [LABELS.get(name, name.removeprefix("ours: ")), *cells]
        for name, of in rows.items()
        if any(cells := [figure(of[setting]) if setting in of else "" for setting in shown])
    ]
    return table(["plan", *(SETTINGS[setting].title for setting in shown)], lines)


def seconds(row: Row) -> str:
    """The step, with the range of its rounds."""
    spread = f" ({min(row.rounds):.2f} to {max(row.rounds):.2f})" if len(row.rounds) > 1 else ""
    return f"{row.seconds:.2f}{spread}"


def seconds_over_bound(row: Row) -> str:
    """The step, and how many times as long as its slowest stage or link it took."""
    return seconds(row) if row.over_bound is None else f"{seconds(row)}; {row.over_bound:.2f}"


def sent(row: Row) -> str:
    return "" if row.sent_bytes is None else f"{row.sent_bytes / 2**20:.1f}"


def slow_goals(model: str) -> str:
    """What was asked of the measured rows and what came of it, side by side for the two plans that are judged."""
    curves = recorded_losses()
    judged: dict[tuple[str, str], dict[str, Goal]] = {}
    for goal in goals(
        measured(SETTINGS, [model]), lambda row: curves[key_of(row)]["loss"] if key_of(row) in curves else None
    ):
        assert goal.of is not None
        judged.setdefault((goal.of.setting, goal.what), {})[goal.of.name] = goal
    order = list(SETTINGS)
    lines = []
    for (setting, what), found in sorted(judged.items(), key=lambda item: order.index(item[0][0])):
        any_goal = next(iter(found.values()))
        wanted = f"{'at least' if any_goal.at_least else 'at most'} {any_goal.bound:g}"
        cells = [_verdict(found.get(f"ours: {plan.name}")) for plan in (HEADLINE, ALL_TAKE_PART)]
        lines.append([f"{SETTINGS[setting].title}: {what}", wanted, *cells])
    return table(["goal", "wanted", "default plan", "all take part"], lines)


def _verdict(goal: Goal | None) -> str:
    if goal is None:
        return ""
    spread = f" ({min(goal.values):.2f} to {max(goal.values):.2f})" if len(goal.values) > 1 else ""
    return f"{'yes' if goal.met else '**no**'}: {goal.value:.2f}{spread}"


def losses(model: str) -> str:
    """Losses after 300 steps of the measured plans that have been trained so far."""
    curves, lines = recorded_losses(), []
    dense = curves[f"{model}, dense"]["loss"] if f"{model}, dense" in curves else None
    for name, of in slow_rows(model).items():
        for setting, row in of.items():
            key = key_of(row)
            if not row.ours or key not in curves or key == f"{model}, dense":
                continue
            over = "" if dense is None else f"{curves[key]['loss'] / dense - 1:+.2%}"
            label = LABELS.get(name, name.removeprefix("ours: "))
            lines.append([label, SETTINGS[setting].title, f"{curves[key]['loss']:.3f}", over])
    first = [] if dense is None else [["every plan without a lossy codec", "", f"{dense:.3f}", ""]]
    return table(["plan", "setting", "loss after 300 steps", "over dense"], first + lines)


def harm() -> str:
    """The loss with every codec that has been tried."""
    rows = RowsFile(RESULTS / "codec_harm.json", {})
    return "\n".join(codec_harm.tables(rows, list(codec_harm.TITLES), list(codec_harm.STARTS)))


def trials() -> str:
    """What was tried for more than the product's codecs give."""
    return "\n".join(codec_trials.report(*codec_trials.runs()))


def prediction() -> str:
    """Predicted and measured steps, in milliseconds."""
    found = recorded("prediction")
    lines = [
        [
            f"{each['model']}, {each['topology']}, `{each['policy']}`",
            f"{each['measured'] * 1e3:.0f} ({each['fastest'] * 1e3:.0f} to {each['slowest'] * 1e3:.0f})",
            *(
                f"{each[kind] * 1e3:.0f} ({each[kind] / each['measured'] - 1:+.0%})"
                for kind in ("planned", "calibrated")
            ),
        ]
        for each in found["settings"]
    ]
    errors = [
        f"{found['errors'][kind]['median']:.0%}, worst {found['errors'][kind]['worst']:.0%}"
        for kind in ("planned", "calibrated")
    ]
    lines.append(["median error", "", *errors])
    return table(["setting", "measured (range)", "as planned", "calibrated"], lines)


_RECOVERIES = {
    "default": {
        "loopback": "recovery_0",
        "100 Mbit/s": "recovery_1",
        "width 384": "recovery_1_width_384",
        "20 Mbit/s": "recovery_2",
        "loopback, larger batch": "recovery_0_yardstick",
        "100 Mbit/s, larger batch": "recovery_1_yardstick",
    },
    "equal": {
        "loopback, after step 150": "recovery_0_after_150_equal-compute",
        "100 Mbit/s, 4 bits": "recovery_1_int4",
        "20 Mbit/s, 4 bits": "recovery_2_int4",
        "the same, after step 150": "recovery_2_after_150_int4",
    },
}
"""Policy -> column -> record."""


def recovery(policy: str = "default") -> str:
    """From the kill to the next completed step, per network; for a larger model, or with other cuts with 4 bits and for a loss later in a job."""
    columns = _RECOVERIES[policy]
    lines: list[list[str]] = []
    for index, name in enumerate(columns.values()):
        (found,) = recorded(name)["results"]
        adoptions, restarts = found["adoptions"], found["restarts"]
        steps = [loss["replayed_steps"] for loss in adoptions]
        kinds = {
            "a step": [loss["median_step"] for loss in adoptions],
            "adoption, from the kill": [loss["next_step"] for loss in adoptions],
            "adoption, from the notice, in median steps": [
                (loss["next_step"] - loss["noticed"]) / loss["median_step"] for loss in adoptions
            ],
            "restart from the last checkpoint": [loss["next_step"] for loss in restarts],
            "heavy rescheduling (put together, see below)": found["heavy_rescheduling_seconds"],
            "state in place again, nothing trained yet: adoption": [loss["in_place"] for loss in adoptions],
            "the same: heavy rescheduling": found["heavy_in_place_seconds"],
        }
        for at, (what, values) in enumerate(kinds.items()):
            if index == 0:
                lines.append([what])
            lines[at].append(f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        once = {
            "steps replayed": f"{min(steps)} to {max(steps)}",
            "heavy rescheduling over adoption": _times(found["heavy_over_adoption"]),
            "the same until state is in place": _times(found["heavy_over_adoption_in_place"]),
        }
        for at, (what, value) in enumerate(once.items(), len(kinds)):
            if index == 0:
                lines.append([what])
            lines[at].append(value)
    return table(["", *columns], lines)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 10 else f"{ratio:.0f}"


def chaos() -> str:
    """A line for each of the jobs of `chaos.py` that was recorded, the plain one first."""
    files = sorted(RESULTS.glob("chaos*.json"))
    rows = []
    for found in (recorded(file.stem) for file in files):
        rows.append(
            [
                found.get("job", "plain"),
                f"{found['steps']:,}",
                str(sum(found["faults"].values())),
                str(len(found["wrong"])),
                f"{found['seconds']:.0f} s",
                f"{found['goodput']:.0%}",
            ]
        )
    return table(["job", "steps", "faults", "differences", "took", "useful"], rows)


def paper_scale(topology: str) -> str:
    """Simulated seconds per step, the speed-up over the faster dense baseline, and how many workers have a fragment."""
    rows = [row for row in recorded("paper_scale")["rows"] if row["topology"] == topology]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines: dict[tuple[str, str, bool], dict[str, str]] = {}
    for row in rows:
        baseline = row["policy"] != "op-fence"
        line = lines.setdefault((row["policy"], row["codec"], row["everyone"] and not baseline), {})
        line[row["model"]] = f"{_figures(row['step_seconds'])} s ({_figures(row['speedup'])}), {row['workers']}"
    return table(
        ["plan, codec", *models],
        [
            [
                f"{policy}{', all take part' if everyone else ''}; {'dense' if codec == 'none' else codec}",
                *(cells.get(model, "") for model in models),
            ]
            for (policy, codec, everyone), cells in lines.items()
        ],
    )


def _figures(value: float) -> str:
    """Three figures."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
