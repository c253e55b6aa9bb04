"""The workload's sums and crossings agree with the OP-DAG and with `dag.cut`."""

from __future__ import annotations

from random import Random

import pytest
from scheduler_cases import chain, transformer

from dag.cut import cut, cut_points
from dag.graph import OpDag
from dag.workload import workload


@pytest.mark.parametrize("dag", [transformer(4), transformer(4, tied=True), chain([5, 6, 7, 8], [3, 1, 2])])
def test_crossings_are_the_edges_of_the_cut(dag: OpDag) -> None:
    work, generator = workload(dag), Random(0)
    legal = [point.position for point in cut_points(dag)]
    for _ in range(40):
        cuts = sorted(generator.sample(legal, generator.randint(0, min(5, len(legal)))))
        crossings = work.crossings(cuts)
        edges = cut(dag, cuts).edges
        assert len(crossings) == len(edges)
        for edge in edges:
            assert crossings.value[edge.index] == edge.value
            assert crossings.source[edge.index] == edge.source
            assert crossings.target[edge.index] == edge.target
            assert crossings.gradient[edge.index] == edge.gradient
            assert crossings.parameter[edge.index] == (edge.kind == "parameter")


def test_sums_cover_the_whole_dag() -> None:
    dag = transformer(3)
    work = workload(dag)
    assert work.size == len(dag.body)
    assert work.flops[-1] == sum(op.flops for op in dag.ops)
    assert work.backward_flops[-1] == sum(op.backward_flops for op in dag.ops)
    assert work.parameter_bytes[-1] == sum(dag.ops[parameter.op].meta.nbytes for parameter in dag.parameters)
    assert work.saved[-1] == sum(op.saved_bytes for op in dag.ops)
    assert [point.position for point in work.cut_points] == list(work.positions)


def test_a_tied_parameter_is_counted_once_and_known_as_shared() -> None:
    tied, untied = workload(transformer(2, tied=True)), workload(transformer(2))
    assert tied.parameter_bytes[-1] < untied.parameter_bytes[-1]
    ((_, users),) = tied.shared_parameters
    assert len(users) == 2
    assert untied.shared_parameters == ()
