"""Moves tensors between a device and pinned host memory without holding up the computation.

Copies run on a stream of their own. Events order them after the values they copy, and order the computation after the
copies it needs, so no thread waits for the device except in `ToHost.wait`. Pinned memory comes from torch's caching host
allocator, which gives a block out again only when the copies that use it are done. On the CPU nothing is copied.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor


class Runtime(Protocol):
    """What staging needs of a device's runtime; `Cuda` is torch's, tests bring a fake."""

    def new_stream(self) -> Any: ...
    def current_stream(self) -> Any: ...
    def running_on(self, stream: Any) -> AbstractContextManager[Any]: ...
    def record_event(self, stream: Any) -> Any: ...
    def keep_until(self, tensor: Tensor, stream: Any) -> None: ...
    def pinned(self, like: Tensor) -> Tensor: ...


class Cuda:
    """torch.cuda on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current_stream(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def running_on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def record_event(self, stream: Any) -> Any:
        """An event that is complete when everything queued on `stream` so far is."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def keep_until(self, tensor: Tensor, stream: Any) -> None:
        """Don't reuse the tensor's device memory, once freed, before what `stream` holds now is done."""
        tensor.record_stream(stream)

    def pinned(self, like: Tensor) -> Tensor:
        """Uninitialised, contiguous, page-locked host memory for a tensor of this shape and dtype."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


class ToHost:
    """A copy to the host under way."""

    def __init__(self, tensor: Tensor, done: Any) -> None:
        self._tensor = tensor
        self._done = done

    @property
    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._done is None or bool(self._done.query())

    def wait(self) -> Tensor:
        """The tensor in host memory; blocks the calling thread (not others) until the copy is complete."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor


class ToDevice:
    """A copy to the device under way."""

    def __init__(self, tensor: Tensor, done: Any, runtime: Runtime | None) -> None:
        self._tensor = tensor
        self._done = done
        self._runtime = runtime

    def take(self) -> Tensor:
        """The tensor on the device, for the thread that computes: its stream waits for the copy, the thread does not."""
        if self._runtime is not None:
            stream = self._runtime.current_stream()
            stream.wait_event(self._done)
            self._runtime.keep_until(self._tensor, stream)
        return self._tensor


class Stager:
    """Copies for one device. Its methods may be called from any thread; `to_host` from the one that computes."""

    def __init__(self, device: torch.device, runtime: Runtime | None = None) -> None:
        self._device = device
        self._runtime = runtime if runtime is not None or device.type == "cpu" else Cuda(device)
        if self._runtime is not None:
            # One stream for each direction: a device has copy engines for both.
            self._outward = self._runtime.new_stream()
            self._inward = self._runtime.new_stream()

    def to_host(self, tensor: Tensor) -> ToHost:
        """Begin to copy a value that the current stream has been told to compute."""
        runtime = self._runtime
        if runtime is None:
            return ToHost(tensor, None)
        computed = runtime.record_event(runtime.current_stream())
        host = runtime.pinned(tensor)
        with runtime.running_on(self._outward):
            self._outward.wait_event(computed)
            host.copy_(tensor, non_blocking=True)
            runtime.keep_until(tensor, self._outward)
            done = runtime.record_event(self._outward)
        return ToHost(host, done)

    def to_device(self, tensor: Tensor) -> ToDevice:
        """Begin to copy a host tensor; its memory may be reused as soon as this returns."""
        runtime = self._runtime
        if runtime is None:
            return ToDevice(tensor, None, None)
        host = runtime.pinned(tensor)
        host.copy_(tensor)
        with runtime.running_on(self._inward):
            device = host.to(self._device, non_blocking=True)
            done = runtime.record_event(self._inward)
        return ToDevice(device, done, runtime)
