"""How many micro-batches of a replay there is memory for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from worker_cases import make_case, partition_of

from executor.lanes import Lanes
from worker.jobs.side_by_side import SideBySide
from worker.machine.memory import MemoryGuard

CASE = make_case()


class Used(MemoryGuard):
    """Half of its limit is in use."""

    def used(self) -> int:
        return self.limit // 2


@pytest.mark.parametrize("micro_batches", [0, 1, 3])
def test_a_tenth_of_the_memory_is_left_alone(micro_batches: int) -> None:
    """Who goes over the limit fails the job, and what micro-batches take is an estimate."""
    prepare = CASE.prepare(("a", "b"))
    dag = CASE.dag
    partition = partition_of(prepare, CASE)
    fragment = partition.fragments[1]
    lanes = Lanes(2, 1)
    saved = sum(dag.ops[op].saved_bytes for op in fragment.ops)
    ends = [dag.ops[op].output_bytes for op in fragment.parameters]
    ends += [dag.ops[edge.value].output_bytes for edge in (*fragment.inputs, *fragment.outputs)]
    wanted = lanes.count * saved + micro_batches * sum(ends)
    limit = -(-wanted * 10 // 4)  # 0.9 of it, less the half that is in use
    assembly: Any = SimpleNamespace(dag=dag, partition=partition)
    nothing: Any = None
    beside = SideBySide(assembly, {}, nothing, Used(limit), lanes)
    assert beside._room(1) == micro_batches
