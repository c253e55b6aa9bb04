"""Steps replayed with several micro-batches at the same time: the bits of the run that they replay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from executor_models import CASES, captured, random_cuts
from executor_pipeline import Outcome, Pipeline, Settings, same
from torch import Tensor

from executor.lanes import Lanes
from executor.program import FragmentProgram, Whole
from fusion.wire import FrameKind

LANES = 3
STATISTICS = ("resnet", "unet")


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    made = Lanes(LANES, 1)
    yield made
    made.close()


class Replay:
    """One fragment from the beginning, by what the others have sent it in a run."""

    def __init__(self, name: str, run: Pipeline, program: FragmentProgram, lanes: Lanes) -> None:
        self._batch_of = CASES[name].batch_of
        self._run = run
        self._program = program
        self._lanes = lanes

    def step(self, step: int, begin: int) -> None:
        """Micro-batches before `begin` one after the other, as tasks; the others side by side."""
        count = self._run.settings.micro_batches
        for micro_batch in range(begin):
            arrivals, data, gradients = self._given(step, micro_batch)
            outputs = self._program.forward(step, micro_batch, arrivals, data).outputs
            self._compare(step, micro_batch, outputs, self._program.backward(step, micro_batch, gradients))
        for first in range(begin, count, LANES):
            chosen = range(first, min(first + LANES, count))
            calls = [partial(self._program.whole, step, index, *self._given(step, index)) for index in chosen]
            for micro_batch, whole in zip(chosen, self._lanes.run(calls), strict=True):
                self._program.add_up(whole)
                self._compare(step, micro_batch, whole.forward.outputs, whole.returned)
        norms = {fragment.index: self._value(FrameKind.NORMS, fragment.index, step) for fragment in self._fragments}
        self._program.update(step, norms)  # type: ignore[arg-type]

    @property
    def _fragments(self):  # type: ignore[no-untyped-def]
        return self._run.partition.fragments

    def _given(self, step: int, micro_batch: int):  # type: ignore[no-untyped-def]
        fragment = self._program.fragment
        arrivals = {
            edge.index: self._value(FrameKind.ACTIVATION, edge.index, step, micro_batch * (edge.kind == "activation"))
            for edge in fragment.inputs
        }
        gradients = {
            edge.index: self._value(FrameKind.GRADIENT, edge.index, step, micro_batch)
            for edge in fragment.outputs
            if edge.gradient
        }
        return arrivals, self._batch_of(step, micro_batch), gradients

    def _value(self, kind: FrameKind, edge: int, step: int, micro_batch: int = 0) -> Tensor | None:
        return self._run.values[kind, edge, step, micro_batch]

    def _compare(
        self, step: int, micro_batch: int, outputs: dict[int, Tensor], returned: dict[int, Tensor | None]
    ) -> None:
        for kind, made in ((FrameKind.ACTIVATION, outputs), (FrameKind.GRADIENT, returned)):
            for edge, value in made.items():
                before = self._value(kind, edge, step, micro_batch)
                assert (value is None and before is None) or same(value, before), (kind, edge, step, micro_batch)  # type: ignore[arg-type]


def replay(name: str, fragments: int, seed: int, lanes: Lanes) -> int:
    """Runs a job and replays its fragments; returns how many of them can be replayed side by side."""
    made = captured(name)
    settings = Settings(micro_batches=5, clip_grad_norm=0.5)
    run = Pipeline(made.dag, made.tensors, random_cuts(made.dag, fragments, seed), settings, shuffle=seed)
    outcome: Outcome = run.run(CASES[name].batch_of)
    found = 0
    for fragment in run.partition.fragments:
        program = run.fresh(fragment)
        if not program.apart:
            continue
        found += 1
        again = Replay(name, run, program, lanes)
        for step in range(1, settings.steps + 1):
            again.step(step, begin=step % 3)
        for key, value in program.state().items():
            assert same(value, outcome.state[key]), key
    for key, value in run.values.items():
        copy = run.copies[key]
        assert value is copy or same(value, copy), f"{key} was written to"  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", [name for name in CASES if name not in STATISTICS])
def test_side_by_side_gives_the_bits_of_one_after_the_other(name: str, lanes: Lanes) -> None:
    assert replay(name, 4, 3, lanes) > 0


def test_fragments_with_running_statistics_are_not_apart_and_the_others_of_the_model_are(lanes: Lanes) -> None:
    made = captured("resnet")
    run = Pipeline(made.dag, made.tensors, random_cuts(made.dag, 6, 0), Settings())
    apart = [program.apart for program in run.programs]
    assert apart == [not program.fragment.written_buffers for program in run.programs]
    assert False in apart


def test_the_time_that_a_thread_waits_for_others_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its own counts: at the begin, between forward and backward, and at the end."""
    made = captured("gpt")
    program = Pipeline(made.dag, made.tensors, [], Settings()).programs[0]
    monkeypatch.setattr("executor.program.thread_time", iter([1.0, 3.0, 8.0]).__next__)
    whole = program.whole(1, 0, {}, CASES["gpt"].batch_of(1, 0), {})
    assert (whole.forward_seconds, whole.backward_seconds) == (2.0, 5.0)


def test_what_fails_is_told_when_all_have_ended(lanes: Lanes) -> None:
    ended = threading.Event()

    def fail() -> Whole:
        raise ValueError("the first")

    def succeed() -> Whole | None:
        ended.set()
        return None

    with pytest.raises(ValueError, match="the first"):
        lanes.run([fail, succeed])
    assert ended.is_set()


def test_each_lane_has_as_many_threads_as_it_is_given() -> None:
    made = Lanes(2, 2)
    together = threading.Barrier(2, timeout=30)

    def count() -> int:
        together.wait()
        return torch.get_num_threads()

    assert made.run([count, count]) == [2, 2]
    made.close()
