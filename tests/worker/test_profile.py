"""What a worker measures of itself: the line through timings, and rates that are there and plausible."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from random import Random
from time import process_time

import pytest
import torch

from fusion.errors import UserError
from fusion.messages import Device
from worker.machine.device import device_in_words, measure
from worker.machine.profile import Profile, profile
from worker.machine.profile_line import fit


def test_the_line_through_exact_timings_is_found() -> None:
    line = fit([(amount, 0.02 + amount / 1e6) for amount in (0, 4e3, 64e3, 256e3)])
    assert (line.seconds, line.rate) == pytest.approx((0.02, 1e6))


def test_the_line_goes_through_noise() -> None:
    noise = Random(3)
    for rate in (1e5, 1e7, 1e9):
        amounts = [rate * factor * 1e-2 for factor in (0.25, 1, 4, 16)] * 3
        line = fit([(amount, (0.01 + amount / rate) * noise.uniform(0.95, 1.05)) for amount in amounts])
        assert line.rate == pytest.approx(rate, rel=0.15)
        assert line.seconds == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize("points", [[(1e3, 0.1)], [(1e3, 0.1), (2e3, 0.1)], [(1e3, 0.2), (4e3, 0.1)], [(1, 1), (2, 3)]])
def test_a_line_that_noise_has_turned_over_keeps_both_parts_positive(points: list[tuple[float, float]]) -> None:
    line = fit(points)
    assert line.seconds >= 0
    assert 0 < line.rate < math.inf
    rates = [amount / seconds for amount, seconds in points]
    assert line.seconds > 0 or 0.999 * min(rates) <= line.rate <= 1.001 * max(rates)


def test_no_line_without_points() -> None:
    with pytest.raises(ValueError, match="no timings"):
        fit([])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a worker. Several would wait for one another in busy loops, on a busy machine for long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_device_in_words_says_how_much_of_the_machine_it_computes_on() -> None:
    part = Device(kind="cpu", cores=8, threads=1, memory_bytes=2**33, flops_per_second=9.6e10)
    assert device_in_words(part) == "cpu, 1 thread on 8 cores, 8.0 GiB, 96 GFLOP/s"
    whole = part.model_copy(update={"threads": 8})
    assert device_in_words(whole) == "cpu, 8 threads, 8.0 GiB, 96 GFLOP/s"
    gpu = part.model_copy(update={"kind": "cuda"})
    assert device_in_words(gpu) == "cuda, 1 thread, 8.0 GiB, 96 GFLOP/s"


@pytest.mark.usefixtures("one_thread")
def test_a_profile_has_every_rate_and_takes_little_time() -> None:
    begin = process_time()
    found = profile(torch.device("cpu"), 1, 0.5, rests=True)
    # Processor time: what a busy machine gives to others does not count.
    assert process_time() - begin < 2
    for rate in (found.flops_per_second, found.convolution_flops_per_second, found.bytes_per_second):
        assert 1e7 < rate < 1e15
    for share in (found.training_share, found.convolution_share):
        assert 0 < share <= 1
    for fixed in (found.seconds_per_call, found.seconds_per_convolution):
        assert 0 <= fixed <= 1e-3
    assert 0 <= found.seconds_after_rest <= 1e-2


def test_a_short_profile_leaves_out_what_needs_a_regression() -> None:
    found = profile(torch.device("cpu"), 1, 0.01, rests=True)
    assert min(found.flops_per_second, found.convolution_flops_per_second, found.bytes_per_second) > 1e7
    assert found.training_share == found.seconds_per_call == 0
    assert found.convolution_share == found.seconds_per_convolution == found.seconds_after_rest == 0


def test_what_is_measured_is_what_a_worker_says_of_its_device() -> None:
    assert {field.name for field in fields(Profile)} <= set(Device.model_fields)


def test_a_declared_speed_is_taken_as_it_is() -> None:
    device = measure("cpu", 1, 2**30, speed=4e11)
    assert (device.flops_per_second, device.declared, device.bytes_per_second) == (4e11, True, 0)
    assert device.memory_bytes == 2**30


def test_there_is_no_such_device() -> None:
    with pytest.raises(UserError, match="use cpu, cuda or cuda:N"):
        measure("gpu5", 1, None)
