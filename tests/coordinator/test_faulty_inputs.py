"""The fuzzing benchmark in small: every decoder refuses faulty inputs in words, lets good ones pass, and a crash is noticed."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_inputs import changed, faulty_bytes


@pytest.mark.parametrize("name", ["frames", "control", "dags", "specs", "tensors"])
def test_a_decoder_refuses_in_words_or_takes_it(name: str, tmp_path: Path) -> None:
    makers = {"frames": fuzz.frames, "control": fuzz.control, "dags": fuzz.dags, "tensors": fuzz.tensors}
    target = fuzz.specs(tmp_path) if name == "specs" else makers[name]()
    outcome = fuzz.play(name, target, 250, seed=1)
    assert outcome.crashes == []
    assert sum(outcome.results.values()) == 250
    assert {what.partition(":")[0] for what in outcome.results} == {"accepted", "refused"}


def test_a_crash_is_counted_with_the_number_that_brings_it_back() -> None:
    def target(random: Random) -> str:
        if random.random() < 0.1:
            raise KeyError("not what a decoder should raise")
        return "accepted"

    outcome = fuzz.play("any", target, 100, seed=0)
    assert outcome.results["crashed"] == len(outcome.crashes) > 0
    case = int(outcome.crashes[0].split()[1].rstrip(":"))
    with pytest.raises(KeyError):
        target(Random(f"0/any/{case}"))


def test_inputs_are_a_function_of_their_number_and_leave_the_good_one_alone() -> None:
    good = {"a": [1, {"b": "c"}], "d": None}
    found = [changed(good, Random(seed)) for seed in range(200)]
    assert found == [changed(good, Random(seed)) for seed in range(200)]
    assert good == {"a": [1, {"b": "c"}], "d": None}
    assert sum(value != good for value in found) > 190
    assert faulty_bytes(b"", Random(1)) == faulty_bytes(b"", Random(1))
