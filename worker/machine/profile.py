"""How fast this device is in the classes of operators that matter: short runs, and a line through their times.

The cost model (`scheduler.cost`) counts an operator as the larger of FLOPs / speed and bytes / memory rate, and a fixed time
per call. The speed that training reaches is a share of that of a large matrix product, FusionLLM's lambda; a transformer
layer, forward and back, in several sizes gives that share and the time per call by regression. Convolutions have a line of
their own: a call of a small one takes many times as long as any other operator's. After a rest caches are cold, and the first
millisecond's work takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep, thread_time

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.machine.profile_line import fit

_FLOAT = 4
_MATRICES = (512, 1024, 2048, 4096)
_LAYERS = ((64, 64), (128, 128), (128, 256), (512, 512), (512, 1024), (1024, 2048))
"""Tokens and width of the transformer layers."""
_HEAD = 32
_LAYER_CALLS = 13 * 3
"""Operator calls that compute: 13 forward, and two for each of them back."""
_CONVOLUTIONS = (1, 4, 16, 64)
"""Images of 32 channels, 32 x 32."""
_SMALL_CONVOLUTIONS = ((8, 16), (16, 8), (16, 16), (32, 8), (32, 16), (64, 16))
"""Channels, and height and width, of 8 images that are convolved forward and back."""
_IMAGES = 8
_CONVOLUTION_CALLS = 3
"""One forward, and two in backward."""
_ELEMENTS = 2**18
_LEAST_SHARE = 0.05
_LONGEST_CALL = 1e-3
_LONGEST_AFTER_REST = 1e-2
_REPEATS = 2
_LEAST_FOR_TRAINING = 0.5
"""Seconds: in less, noise would decide what the line is."""
_RESTED = (64, 64)
"""Tokens and width of the transformer layer that runs after rests."""
_REST = 1e-2
_RESTS = 10


@dataclass(frozen=True, slots=True)
class Profile:
    """Rates of the classes of operators, named as in `fusion.messages.Device`."""

    flops_per_second: float
    """Of large matrix products."""
    convolution_flops_per_second: float
    """Of large 3 x 3 convolutions."""
    bytes_per_second: float
    """Read and written by element-wise operators and normalisations."""
    training_share: float
    """Of the speed of matrix products, what training reaches; 0: there was no time to find out."""
    seconds_per_call: float
    """0: there was no time to find out."""
    convolution_share: float
    """Of the speed of convolutions, what training reaches; 0: there was no time to find out."""
    seconds_per_convolution: float
    """Fixed time of a convolution's call; 0: there was no time to find out."""
    seconds_after_rest: float
    """What a task takes longer after a rest than right after another one; 0: nobody wanted to know, or there was no time."""


def profile(device: torch.device, threads: int, seconds: float, *, rests: bool = False) -> Profile:
    """Measure in about `seconds`, a little more on a device that is slow or cold, or where tasks after `rests` count too."""
    watch = _Stopwatch(device, threads)
    # The first product loads the libraries.
    watch.best(_matrix_product(device, 64), 0.0)
    long = seconds >= _LEAST_FOR_TRAINING
    each = seconds / 3.5 if long else seconds / 2
    matrix = max(_rates(watch, each, [(2.0 * n**3, _matrix_product(device, n)) for n in _MATRICES]))
    memory = _memory_rate(watch, each / 3, device)
    convolution = max(_rates(watch, each / 2, [_convolution(device, images) for images in _CONVOLUTIONS]))
    if not long:
        return Profile(matrix, convolution, memory, 0.0, 0.0, 0.0, 0.0, 0.0)
    share, call = _training(watch, each, device, matrix, memory)
    convolving = _convolving(watch, each / 2, device, convolution)
    after_rest = _after_rest(watch, device) if rests else 0.0
    return Profile(matrix, convolution, memory, share, call, *convolving, after_rest)


class _Stopwatch:
    """Times work on a device.

    One thread's speed is counted in the processor time that it got: several workers that start at the same time on one
    machine would otherwise see each other, each differently, and a plan would take equal workers for unequal ones.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._clock = thread_time if device.type == "cpu" and threads == 1 else perf_counter

    def best(self, work: Callable[[], object], seconds: float) -> float:
        """The least time of several runs within about `seconds`; the first is not counted, it makes ready."""
        work()
        deadline, best, runs = perf_counter() + seconds, math.inf, 0
        while runs < _REPEATS or perf_counter() < deadline:
            best = min(best, self.once(work))
            runs += 1
        return max(best, 1e-6)

    def once(self, work: Callable[[], object]) -> float:
        """The time of one run."""
        self._settle()
        begin = self._clock()
        work()
        self._settle()
        return self._clock() - begin

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _rates(watch: _Stopwatch, seconds: float, works: list[tuple[float, Callable[[], object]]]) -> list[float]:
    """Amount per second of each work, smallest first, for as long as the next one fits into what is left of `seconds`."""
    deadline = perf_counter() + seconds
    rates: list[float] = []
    for amount, work in works:
        left = deadline - perf_counter()
        if rates and (_REPEATS + 1) * amount / rates[-1] > left:
            break
        rates.append(amount / watch.best(work, left / 2))
    return rates


def _matrix_product(device: torch.device, size: int) -> Callable[[], object]:
    held: list[Tensor] = []

    def work() -> None:
        if not held:
            held.extend((torch.randn(size, size, device=device), torch.empty(size, size, device=device)))
        torch.mm(held[0], held[0], out=held[1])

    return work


def _convolution(device: torch.device, images: int) -> tuple[float, Callable[[], object]]:
    held: list[Tensor] = []

    def work() -> None:
        if not held:
            held.extend(
                (torch.randn(images, 32, 32, 32, device=device), torch.randn(32, 32, 3, 3, device=device)),
            )
        with torch.no_grad():
            F.conv2d(held[0], held[1], padding=1)

    return _convolution_flops(images, 32, 32), work


def _convolution_flops(images: int, channels: int, side: int) -> float:
    return 2.0 * images * 9 * channels**2 * side**2


def _memory_rate(watch: _Stopwatch, seconds: float, device: torch.device) -> float:
    """Bytes per second of an addition, a GELU and a layer norm, which read and write seven tensors together."""
    elements = _ELEMENTS if device.type == "cpu" else 64 * _ELEMENTS
    first, second = torch.randn(elements // 256, 256, device=device), torch.randn(elements // 256, 256, device=device)

    def work() -> None:
        with torch.no_grad():
            torch.add(first, second)
            F.gelu(first)
            F.layer_norm(first, (256,))

    return 7 * _FLOAT * elements / watch.best(work, seconds)


def _training(
    watch: _Stopwatch, seconds: float, device: torch.device, matrix: float, memory: float
) -> tuple[float, float]:
    """The share of the speed of matrix products that training reaches, and the seconds per call."""
    deadline = perf_counter() + seconds
    points: list[tuple[float, float]] = []
    rate = matrix
    for tokens, width in _LAYERS:
        flops = 3.0 * (24 * tokens * width**2 + 4 * tokens**2 * width)
        left = deadline - perf_counter()
        if len(points) > 1 and (_REPEATS + 1) * flops / rate > left:
            break
        spent = watch.best(_layer(device, tokens, width), left / 3)
        rate = flops / spent
        traffic = 3.0 * _FLOAT * (18 * tokens * width + 4 * tokens**2 * (width // _HEAD))
        # What moves memory is counted by its bytes. It can't be all: a wrong memory rate must not turn the line over.
        points.append((flops, max(spent - traffic / memory, 0.2 * spent)))
    line = fit(points)
    share = min(1.0, max(_LEAST_SHARE, line.rate / matrix))
    return share, min(_LONGEST_CALL, line.seconds / _LAYER_CALLS)


def _convolving(watch: _Stopwatch, seconds: float, device: torch.device, speed: float) -> tuple[float, float]:
    """The share of the speed of large convolutions that training reaches, and the seconds per call of one."""
    deadline = perf_counter() + seconds
    points: list[tuple[float, float]] = []
    for channels, side in _SMALL_CONVOLUTIONS:
        flops = _CONVOLUTION_CALLS * _convolution_flops(_IMAGES, channels, side)
        left = deadline - perf_counter()
        if len(points) > 1 and (_REPEATS + 1) * flops * points[-1][1] / points[-1][0] > left:
            break
        points.append((flops, watch.best(_trained_convolution(device, channels, side), left / 3)))
    line = fit(points)
    share = min(1.0, max(_LEAST_SHARE, line.rate / speed))
    return share, min(_LONGEST_CALL, line.seconds / _CONVOLUTION_CALLS)


def _after_rest(watch: _Stopwatch, device: torch.device) -> float:
    """What a short task takes longer after a rest."""
    work = _layer(device, *_RESTED)
    best = watch.best(work, _REST)
    rested: list[float] = []
    for _ in range(_RESTS):
        sleep(_REST)
        rested.append(watch.once(work))
    return min(_LONGEST_AFTER_REST, max(0.0, median(rested) - best))


def _trained_convolution(device: torch.device, channels: int, side: int) -> Callable[[], object]:
    """A convolution, forward and back."""
    value = torch.randn(_IMAGES, channels, side, side, device=device).requires_grad_()
    weights = torch.randn(channels, channels, 3, 3, device=device).requires_grad_()

    def work() -> None:
        torch.autograd.grad(F.conv2d(value, weights, padding=1).sum(), (value, weights))

    return work


def _layer(device: torch.device, tokens: int, width: int) -> Callable[[], object]:
    """A transformer layer, forward and back."""

    def parameter(*shape: int) -> Tensor:
        return (0.02 * torch.randn(*shape, device=device)).requires_grad_()

    value = torch.randn(tokens, width, device=device).requires_grad_()
    joined, out = parameter(3 * width, width), parameter(width, width)
    up, down = parameter(4 * width, width), parameter(width, 4 * width)

    def work() -> None:
        query, key, there = (
            F.linear(F.layer_norm(value, (width,)), joined).view(tokens, -1, 3, _HEAD).permute(2, 1, 0, 3)
        )
        scores = torch.softmax((query @ key.transpose(1, 2)) * _HEAD**-0.5, dim=-1)
        mixed = value + F.linear((scores @ there).transpose(0, 1).reshape(tokens, width), out)
        result = mixed + F.linear(F.gelu(F.linear(F.layer_norm(mixed, (width,)), up)), down)
        # From a scalar: with gradients of its own, torch loads a library of symbols, which takes longer than all else here.
        torch.autograd.grad(result.sum(), (value, joined, out, up, down))

    return work
