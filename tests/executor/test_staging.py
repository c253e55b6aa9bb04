"""The order of copies and waits, on a fake runtime; with a GPU, the real thing too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from executor.staging import Stager


class FakeEvent:
    def __init__(self, log: list[str], stream: FakeStream) -> None:
        self.log, self.stream = log, stream

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.stream.name}")


class FakeStream:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(f"{self.name} waits for {event.stream.name}")


class FakeRuntime:
    """Notes what is asked of it; memory is ordinary memory."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.names = iter(["out", "in"])
        self.compute = FakeStream(self.log, "compute")

    def new_stream(self) -> Any:
        return FakeStream(self.log, next(self.names))

    def current_stream(self) -> Any:
        return self.compute

    @contextlib.contextmanager
    def running_on(self, stream: FakeStream) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield
        self.log.append("back")

    def record_event(self, stream: FakeStream) -> Any:
        self.log.append(f"event on {stream.name}")
        return FakeEvent(self.log, stream)

    def keep_until(self, tensor: Tensor, stream: FakeStream) -> None:
        self.log.append(f"keep for {stream.name}")

    def pinned(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype)


def test_to_host_copies_after_the_computation_and_keeps_the_source() -> None:
    runtime = FakeRuntime()
    value = torch.arange(6.0).view(2, 3).t()
    staged = Stager(torch.device("cpu"), runtime).to_host(value)
    assert runtime.log == [
        "event on compute",
        "on out",
        "out waits for compute",
        "keep for out",
        "event on out",
        "back",
    ]
    assert staged.ready
    assert torch.equal(staged.wait(), value)
    assert staged.wait().is_contiguous()
    assert runtime.log[-1] == "host waits for out"


def test_to_device_lets_the_computation_wait_not_the_thread() -> None:
    runtime = FakeRuntime()
    stager = Stager(torch.device("cpu"), runtime)
    received = torch.ones(4)
    staged = stager.to_device(received)
    received.zero_()
    assert runtime.log == ["on in", "event on in", "back"]
    assert torch.equal(staged.take(), torch.ones(4))
    assert runtime.log[3:] == ["compute waits for in", "keep for compute"]


def test_the_cpu_copies_nothing() -> None:
    stager = Stager(torch.device("cpu"))
    value = torch.ones(2)
    assert stager.to_host(value).ready
    assert stager.to_host(value).wait() is value
    assert stager.to_device(value).take() is value


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_there_and_back_on_a_gpu() -> None:
    stager = Stager(torch.device("cuda", 0))
    value = torch.randn(1000, 1000)
    on_device = stager.to_device(value).take()
    assert torch.equal(stager.to_host(on_device * 2).wait(), value * 2)
