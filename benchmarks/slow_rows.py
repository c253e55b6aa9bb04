"""The measured rows of `slow_network.py`: what each holds, the file of each setting, and how near a step came to its bound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.rows_file import RowsFile
from fusion.plan import Plan
from fusion.submit import CapturedJob
from fusion.topology import Topology
from scheduler import Training, from_topology, simulate_plan


@dataclass(frozen=True)
class Row:
    """One side in one setting; seconds per step. Of several rounds it holds medians, but extremes and losses of all or the last."""

    model: str
    setting: str
    name: str
    seconds: float
    """The median of the counted steps."""
    fastest: float
    slowest: float
    losses: tuple[float | None, ...]
    """Of every step; None where it was no number."""
    warm_up: int
    """Steps at the start that are not counted."""
    disturbed: float
    """Cores that other programs took meanwhile."""
    sent_bytes: int | None = None
    """Between workers, in one step."""
    link_seconds: float | None = None
    """What the busiest link takes for the bytes of a step: no step is faster."""
    stage_seconds: float | None = None
    """What the busiest worker's tasks take, by its own clock, waiting for one of this machine's cores included."""
    predicted: float | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    uniform: bool = False
    rounds: tuple[float, ...] = ()
    """The median of each round's counted steps: compared with those of another row of the same rounds, as a machine's speed drifts."""

    @property
    def bound(self) -> float | None:
        """No step is faster than its slowest stage and its slowest link."""
        if self.stage_seconds is None or self.link_seconds is None:
            return None
        return max(self.stage_seconds, self.link_seconds)

    @property
    def over_bound(self) -> float | None:
        """Link efficiency: 1 would be a step in which the slowest part never waits."""
        return self.seconds / self.bound if self.bound else None

    @property
    def ours(self) -> bool:
        return bool(self.plan)


def rows_file(setting: str, model: str) -> RowsFile:
    """`slow_network_SETTING.json`, or `slow_network_SETTING_MODEL.json` for another model than the GPT."""
    of = "" if model == "gpt" else f"_{model}"
    return RowsFile(RESULTS / f"slow_network_{setting}{of}.json", {"model": model, "setting": setting})


def of_rounds(rows: Sequence[Row]) -> Row:
    """One row of what was measured of it in every round."""

    def middle(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    return replace(
        rows[-1],
        seconds=median(row.seconds for row in rows),
        fastest=min(row.fastest for row in rows),
        slowest=max(row.slowest for row in rows),
        disturbed=max(row.disturbed for row in rows),
        link_seconds=middle(row.link_seconds for row in rows),
        stage_seconds=middle(row.stage_seconds for row in rows),
        predicted=middle(row.predicted for row in rows),
        rounds=tuple(row.seconds for row in rows),
    )


def over(one: Row, other: Row) -> tuple[float, ...]:
    """How many times as long `one` takes as `other`, round by round where both have the same rounds."""
    if one.rounds and len(one.rounds) == len(other.rounds):
        return tuple(mine / theirs for mine, theirs in zip(one.rounds, other.rounds, strict=True))
    return (one.seconds / other.seconds,)


def put(row: Row, machine: Mapping[str, Any]) -> None:
    """Into its setting's file, in place of an older measurement."""
    rows_file(row.setting, row.model).add(row.name, asdict(row) | {"machine": dict(machine)})


def measured(settings: Iterable[str], models: Iterable[str]) -> list[Row]:
    """Every row that is there, setting by setting."""
    found = []
    for model in models:
        for setting in settings:
            rows = rows_file(setting, model)
            for name in rows:
                held = {key: value for key, value in rows[name].items() if key != "machine"}
                rounds = tuple(held.get("rounds", ()))
                found.append(Row(**held | {"losses": tuple(held["losses"]), "rounds": rounds}))
    return found


def link_seconds(topology: Topology, job: CapturedJob, plan: Plan) -> float:
    """Seconds for which the busiest link is busy with one step's bytes, as the simulator counts them."""
    devices, network = from_topology(topology)
    training = Training(micro_batches=job.spec.train.micro_batches, optimizer=job.spec.train.optimizer)
    played = simulate_plan(job.dag, plan, devices, network, training, trace=False)
    return max(
        (size / topology.link(*ends)[0] for ends, size in played.bytes_per_link.items() if ends[0] != ends[1]),
        default=0.0,
    )


def stage_seconds(timeline: Mapping[str, Any]) -> float | None:
    """Seconds per step of the busiest worker's tasks, from what the workers told; None where too few steps were."""
    return max(
        (share["forward"] + share["backward"] + share["update"] for share in timeline["shares"]),
        default=None,
    )
