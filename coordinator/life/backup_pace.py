"""How far apart rounds of snapshots are, and over how long each is spread, by what they take of links and processors. Sans I/O."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Literal

from coordinator.life.jobs import Job
from coordinator.life.links import Links
from coordinator.life.run import Run
from fusion.plan import Plan

MOST_STEPS = 3
"""Steps between rounds where these cost little ..."""
_MOST_SECONDS = 5.0
"""... or fewer, where steps take long."""
_FEWEST_SECONDS = 0.25
"""Rounds closer together than this gain nothing that a person could notice."""
_LINK_SHARE = 60.0
"""Snapshots alone would keep any link busy for at most one part in so many of the time (`benchmarks/backup_overhead.py --link`
has what a step then takes)."""
_SPREAD = 4.0
"""Snapshots take so many times as long as they need to: the less of a link they take, the less do the training's messages wait, ..."""
_FELT_SECONDS = 0.25
"""... where they would keep a link busy for so long."""
_SPREAD_SHARE = 8.0
"""But a loss meanwhile replays what came since the round before: no longer than one part in so many of the time between rounds, ..."""
_LONGEST_SPREAD = 20.0
"""... nor than so many seconds, in which fragments that are to move wait."""
_SHARE = 10.0
"""Where nobody has measured the links: they are under way for at most one part in so many of the time;"""
_LEAST_SHARE = 2.0
"""... where the links are known, for one in so many, however much longer than by themselves they take."""
_WORK = 8e-9
"""Processor seconds for each byte of a snapshot, half of them at either end: checksums, copies, encryption. From a profile
of one worker that sends 5.5 MB and takes as much in."""
_OVERHEAD = 0.02
"""Share of a worker's time that this may take: less than the 3% that a step may be longer, as the logs cost too."""
_GROWTH = 2
"""The steps between two rounds grow by this factor at most."""


def spacing(
    every: int | Literal["auto"], pace: float, cost: float, work: float = 0.0, carrying: float | None = None
) -> int:
    """Steps from one common step to the next.

    `pace` is in seconds per step; a round takes `cost` seconds, in which it occupies each worker's processor for `work`
    and, where that is known, the busiest link for `carrying`.
    """
    if every != "auto":
        return every
    if pace <= 0:
        return MOST_STEPS
    wanted = min(MOST_STEPS, math.ceil(_MOST_SECONDS / pace))
    # A round that was faster than its links are said to be shows that they are faster.
    links = _SHARE * cost if carrying is None else max(_LINK_SHARE * min(carrying, cost), _LEAST_SHARE * cost)
    affordable = math.ceil(max(links, work / _OVERHEAD, _FEWEST_SECONDS) / pace)
    return max(1, wanted, affordable)


def spread(between: float, carried: float | None) -> float:
    """Seconds over which to spread the snapshots of a round, where rounds are `between` seconds apart; 0: as fast as they go.

    `carried` is what they take on the busiest link by themselves; None: it has not been measured.
    """
    if carried is None or carried < _FELT_SECONDS:
        return 0.0
    seconds = min(_SPREAD * carried, between / _SPREAD_SHARE, _LONGEST_SPREAD)
    return seconds if seconds > carried else 0.0


def steps_to_next(job: Job, plan: Plan, run: Run, carried: float | None) -> int:
    """Steps to the next round of this job, if its snapshots keep the busiest link for `carried` seconds."""
    every = job.spec.fault_tolerance.backup_every
    wanted = spacing(every, run.pace, run.cost, _work(job, plan), carried)
    # One round that took long, as the first ones do, must not put the next one off for long.
    return min(wanted, _GROWTH * run.spacing) if every == "auto" else wanted


def _work(job: Job, plan: Plan) -> float:
    """Processor seconds that a round takes of each worker, were they all to send and hold alike."""
    return _WORK * sum(_state_bytes(job).values()) / len(plan.workers)


def _state_bytes(job: Job) -> dict[int, int]:
    """Fragment -> the size of a snapshot of it."""
    copies = 1 + job.train.optimizer.slots
    return {summary.index: summary.parameter_bytes * copies for summary in job.fragments}


def carrying(job: Job, plan: Plan, backups: Mapping[int, str], links: Links) -> float | None:
    """Seconds that the snapshots of a round take on the busiest link of a worker, in or out, with nothing else on it.

    None where somebody's link has not been measured.
    """
    seconds = defaultdict[tuple[str, str], float](float)
    for fragment, count in _state_bytes(job).items():
        if (to := backups.get(fragment)) is None:
            continue
        took = links.transfer(plan.placement[fragment], to, count)
        if took is None:
            return None
        seconds[plan.placement[fragment], "out"] += took
        seconds[to, "in"] += took
    return max(seconds.values(), default=0.0)
