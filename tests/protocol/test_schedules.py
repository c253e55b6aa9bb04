"""Schedules of crashes, stalls, partitions, joins and departures, played against the real session and the real life cycle.

`FUSION_SCHEDULES=10000 pytest tests/protocol` plays so many, with a new seed each time; without it a few, always the same.
"""

from __future__ import annotations

import os
from typing import Literal

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from protocol_values import CASES
from protocol_worker import Process
from protocol_world import COORDINATOR, World

SCHEDULES = int(os.environ.get("FUSION_SCHEDULES", "0"))
FEW = 100

which = st.integers(0, 7)


class Schedule(RuleBasedStateMachine):
    """Each rule is a fault; between them a while passes. In the end faults stop, and the job must end as if there were none."""

    world: World

    @initialize(
        case=st.sampled_from(sorted(CASES)),
        seed=st.integers(0, 2**32 - 1),
        workers=st.integers(1, 4),
        backup_every=st.sampled_from([2, 1, 3, "auto"]),
        log_memory=st.sampled_from([2**20, 150]),
        keep=st.sampled_from([3, 1]),
        stopping=st.booleans(),
        events=st.integers(30, 200),
    )
    def begin(
        self,
        case: str,
        seed: int,
        workers: int,
        backup_every: Literal[1, 2, 3, "auto"],
        log_memory: int,
        keep: int,
        stopping: bool,
        events: int,
    ) -> None:
        self.world = World(
            case, seed, workers, backup_every=backup_every, log_memory=log_memory, keep=keep, stopping=stopping
        )
        self.world.play(events)

    def one(self, index: int) -> Process:
        live = self.world.live()
        return live[index % len(live)]

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.world.finish()
        finally:
            note("\n".join(self.world.story))

    @property
    def any_live(self) -> bool:
        return bool(self.world.live())

    @rule(events=st.sampled_from([1, 5, 20, 60, 200]))
    def a_while_passes(self, events: int) -> None:
        self.world.play(events)

    # Workers -----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.any_live)
    @rule(index=which)
    def kill(self, index: int) -> None:
        self.one(index).die()
        self.world.play(20)

    @precondition(lambda self: self.any_live)
    @rule(index=which, after=st.integers(1, 40))
    def kill_midway(self, index: int, after: int) -> None:
        """Between two things that it would let others know: a message, a report, a snapshot."""
        self.one(index).fuse = after
        self.world.play(60)

    @precondition(lambda self: self.any_live)
    @rule(index=which, other=which)
    def kill_two(self, index: int, other: int) -> None:
        for process in dict.fromkeys((self.one(index), self.one(other))):  # In an order that is always the same.
            process.die()
        self.world.play(20)

    @precondition(lambda self: self.any_live)
    @rule(index=which)
    def kill_with_backup(self, index: int) -> None:
        victim, run = self.one(index), self.world.job.run
        holders = set() if run is None else {run.holders.get(f) for f in victim.run.hosted} if victim.run else set()
        for process in self.world.live():
            if process is victim or process.name in holders:
                process.die()
        self.world.play(60)

    @precondition(lambda self: self.any_live)
    @rule(index=which)
    def stall(self, index: int) -> None:
        self.one(index).stall()
        self.world.play(60)

    @rule()
    def wake(self) -> None:
        for process in self.world.live():
            process.wake()
        self.world.play(20)

    @precondition(lambda self: self.any_live)
    @rule(index=which, factor=st.sampled_from([1.0, 3.0]))
    def slow_down(self, index: int, factor: float) -> None:
        self.world.slow[self.one(index).name] = factor

    # The pool ----------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from("abcde"))
    def join(self, name: str) -> None:
        self.world.start_worker(name)
        self.world.play(60)

    @precondition(lambda self: self.any_live)
    @rule(index=which)
    def drain(self, index: int) -> None:
        self.world.drain(self.one(index).name)
        self.world.play(60)

    @precondition(lambda self: self.any_live)
    @rule(index=which)
    def terminate(self, index: int) -> None:
        self.one(index).leave()
        self.world.play(20)

    # The coordinator ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.coordinator is not None)
    @rule()
    def kill_coordinator(self) -> None:
        assert self.world.coordinator is not None
        self.world.coordinator.die()
        self.world.play(60)

    @precondition(lambda self: self.world.coordinator is not None)
    @rule(after=st.integers(0, 12))
    def kill_coordinator_midway(self, after: int) -> None:
        """Before it writes down what an event changes, or between two of the messages that follow from it."""
        assert self.world.coordinator is not None
        self.world.coordinator.fuse = after
        self.world.play(60)

    @precondition(lambda self: self.world.coordinator is None)
    @rule()
    def start_coordinator(self) -> None:
        self.world.start_coordinator()
        self.world.play(20)

    # The network -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.any_live)
    @rule(index=which, other=which)
    def part(self, index: int, other: int) -> None:
        self.world.cut(self.one(index).name, self.one(other).name)
        self.world.play(60)

    @precondition(lambda self: self.any_live)
    @rule(index=which)
    def part_from_coordinator(self, index: int) -> None:
        self.world.cut(self.one(index).name, COORDINATOR)
        self.world.play(60)

    @rule()
    def heal(self) -> None:
        for pair in list(self.world.network.cuts):
            one, other = sorted(pair)
            self.world.heal(one, other)
        self.world.play(20)

    @rule(
        latency=st.sampled_from([0.005, 0.001, 0.05]),
        drop=st.sampled_from([0.0, 0.02, 0.2]),
        repeat=st.sampled_from([0.0, 0.1]),
        reorder=st.sampled_from([0.0, 0.2]),
    )
    def weather(self, latency: float, drop: float, repeat: float, reorder: float) -> None:
        weather = self.world.network.weather
        weather.latency, weather.drop, weather.repeat, weather.reorder = latency, drop, repeat, reorder
        self.world.play(60)

    @precondition(lambda self: self.any_live)
    @rule(index=which, fragment=st.integers(0, 4))
    def no_room(self, index: int, fragment: int) -> None:
        self.world.full.add((self.one(index).name, fragment))

    @rule(damage=st.sampled_from([0.3, 0.0]))
    def damage_snapshots(self, damage: float) -> None:
        self.world.damage = damage
        self.world.play(60)


@pytest.mark.timeout(max(300, SCHEDULES))
def test_whatever_happens_the_job_ends_with_the_same_bits() -> None:
    run_state_machine_as_test(
        Schedule,
        settings=settings(
            max_examples=SCHEDULES or FEW,
            derandomize=not SCHEDULES,
            database=None,
            stateful_step_count=10,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
