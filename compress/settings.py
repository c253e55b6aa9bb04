"""What each codec is set to, and how many bytes its payload takes, without importing torch.

A codec is named like `int4` or `topk`, optionally with its own options: `topk:ratio=100,value_bits=8`. Options are numbers.
The scheduler and the simulator use these sizes; `compress.codecs` does the encoding.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import ClassVar, Literal

from dag.graph import COMPLEX, DTYPE_BYTES, FLOATING
from fusion.codec_names import CODEC_OPTIONS, check_option, read_codec
from fusion.errors import PlanError

MAX_TOPK_ELEMENTS = 2**31 - 1
BITMAP_BLOCK = 2**16
"""Elements that a 16-bit index within a block can address."""
TOPK_PREFIX = struct.Struct("<IB")
"""Count (uint32, little-endian) and index encoding (uint8)."""
TOPK_PREFIX_BYTES = TOPK_PREFIX.size
REUSED = "topk-reused"


def dtype_name(dtype: object) -> str:
    """`torch.float32` or `float32` -> `float32`. Raises `PlanError` for a dtype that never travels."""
    name = str(dtype).removeprefix("torch.")
    known = [known for known in DTYPE_BYTES if known not in COMPLEX]
    if name not in known:
        raise PlanError(f"tensors of dtype {name} can't travel; known: {', '.join(known)}")
    return name


def raw_bytes(shape: Sequence[int], dtype: object) -> int:
    """Bytes of the tensor as it is."""
    return math.prod(shape) * DTYPE_BYTES[dtype_name(dtype)]


def _check(codec: str, **options: float) -> None:
    for option, value in options.items():
        try:
            check_option(codec, option, value)
        except ValueError as error:
            raise PlanError(str(error)) from None


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of one codec. Integer and boolean tensors travel as they are whatever the codec."""

    name: ClassVar[str]
    lossy: ClassVar[bool] = True

    def payload_bytes(self, shape: Sequence[int], dtype: object) -> int | None:
        """Exact payload size, or None where it depends on the values."""
        if dtype_name(dtype) not in FLOATING or math.prod(shape) == 0:
            return raw_bytes(shape, dtype)
        return self._exact(math.prod(shape), DTYPE_BYTES[dtype_name(dtype)])

    def max_payload_bytes(self, shape: Sequence[int], dtype: object) -> int:
        """No valid payload is larger."""
        exact = self.payload_bytes(shape, dtype)
        return self._most(math.prod(shape), DTYPE_BYTES[dtype_name(dtype)]) if exact is None else exact

    def expected_payload_bytes(self, shape: Sequence[int], dtype: object) -> int:
        """The size to plan with: exact where it is fixed, else that of evenly spread values."""
        exact = self.payload_bytes(shape, dtype)
        return self._typical(math.prod(shape), DTYPE_BYTES[dtype_name(dtype)]) if exact is None else exact

    def _exact(self, elements: int, itemsize: int) -> int | None:
        raise NotImplementedError

    def _most(self, elements: int, itemsize: int) -> int:
        raise NotImplementedError

    def _typical(self, elements: int, itemsize: int) -> int:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Raw(Settings):
    """Every bit of the tensor, row-major."""

    name: ClassVar[str] = "none"
    lossy: ClassVar[bool] = False

    def _exact(self, elements: int, itemsize: int) -> int | None:
        return elements * itemsize


@dataclass(frozen=True, slots=True)
class Bf16(Settings):
    """Rounds float32 and float64 to bfloat16; 16-bit tensors travel as they are."""

    name: ClassVar[str] = "bf16"

    def _exact(self, elements: int, itemsize: int) -> int | None:
        return elements * 2


@dataclass(frozen=True, slots=True)
class Blocks(Settings):
    """Integers of `bits` bits, symmetric around zero, with one bfloat16 scale for each block of `block` values."""

    bits: Literal[2, 3, 4, 8] = 8
    block: int = 64
    stochastic: bool = False
    """Round up or down at random so that the mean is kept, instead of to the nearest."""
    name: ClassVar[str] = "int"

    def __post_init__(self) -> None:
        _check(f"int{self.bits}", block=self.block)

    @property
    def levels(self) -> int:
        """The largest integer; values range over -levels..levels."""
        return int(2 ** (self.bits - 1)) - 1

    def blocks(self, elements: int) -> int:
        return -(-elements // self.block)

    def _exact(self, elements: int, itemsize: int) -> int | None:
        return 2 * self.blocks(elements) + -(-elements * self.bits // 8)


@dataclass(frozen=True, slots=True)
class TopK(Settings):
    """The largest of every `ratio` values, by magnitude, and where they stood; the others become zero.

    `sampled` estimates the threshold from a sample, so that the number kept is only about right, and is several times
    faster. `value_bits` is 32 (values as they are), 16 (bfloat16) or 8 (integers in blocks of 64).
    """

    ratio: float = 100.0
    sampled: bool = False
    value_bits: Literal[8, 16, 32] = 16
    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        _check(self.name, ratio=self.ratio, value_bits=self.value_bits)

    def keep(self, elements: int) -> int:
        """How many values an exact selection keeps: at least one of a tensor that is not empty."""
        return min(elements, math.ceil(elements / self.ratio))

    def most_kept(self, elements: int) -> int:
        """A sampled selection may miss the wanted count by a quarter."""
        wanted = self.keep(elements)
        return min(elements, wanted + max(16, wanted // 4)) if self.sampled else wanted

    def value_bytes(self, kept: int, itemsize: int) -> int:
        if self.value_bits == 8:
            return Blocks().payload_bytes((kept,), "float32") or 0
        return kept * min(itemsize, self.value_bits // 8)

    def _exact(self, elements: int, itemsize: int) -> int | None:
        return None

    def _most(self, elements: int, itemsize: int) -> int:
        kept = self.most_kept(elements)
        index_bytes = -(-elements // 8)
        if kept < BITMAP_BLOCK:  # positions within blocks can always be written
            index_bytes = min(index_bytes, 2 * kept + 2 * -(-elements // BITMAP_BLOCK))
        return TOPK_PREFIX_BYTES + index_bytes + self.value_bytes(kept, itemsize)

    def _typical(self, elements: int, itemsize: int) -> int:
        kept = self.keep(elements)
        # Gaps between kept values are about exponential with mean `ratio`: a varint takes a second byte beyond 127.
        varint = kept * (1 + math.exp(-128 / self.ratio) + math.exp(-16384 / self.ratio))
        blocked = 2 * kept + 2 * -(-elements // BITMAP_BLOCK)
        index_bytes = min(-(-elements // 8), blocked, math.ceil(varint))
        return TOPK_PREFIX_BYTES + index_bytes + self.value_bytes(kept, itemsize)


@dataclass(frozen=True, slots=True)
class TopKReused(TopK):
    """Top-k of a gradient at the places that its activation's top-k kept: only the values travel (`compress.places`).

    `ratio` is the activation's. Where the receiver may not have the places any more, an ordinary top-k payload is sent.
    """

    name: ClassVar[str] = REUSED

    def most_kept(self, elements: int) -> int:
        """As many as an activation may have kept, sampled or not."""
        wanted = self.keep(elements)
        return min(elements, wanted + max(16, wanted // 4))

    def _typical(self, elements: int, itemsize: int) -> int:
        return self.value_bytes(self.keep(elements), itemsize)


def with_options(name: str, **options: float) -> str:
    """The codec called `name`, with these options in its name too, in place of its own."""
    base, _, written = name.partition(":")
    kept = [item for item in written.split(",") if item and item.partition("=")[0] not in options]
    # Names have no exponents, which a float's own text may have.
    return f"{base}:{','.join([*kept, *(f'{key}={Decimal(repr(value)):f}' for key, value in options.items())])}"


def reuses(name: str) -> bool:
    """Whether the codec called `name` sends values at places that its receiver knows already."""
    return name.partition(":")[0] == REUSED


def self_contained(name: str) -> str:
    """The codec that says the same to a receiver who knows nothing yet; most codecs are that themselves."""
    return TopK.name + name.removeprefix(REUSED) if reuses(name) else name


CODECS: dict[str, Settings] = {
    "none": Raw(),
    "bf16": Bf16(),
    "int8": Blocks(bits=8),
    "int4": Blocks(bits=4),
    "int3": Blocks(bits=3),
    "int2": Blocks(bits=2),
    "topk": TopK(),
    "topk-sampled": TopK(sampled=True),
    REUSED: TopKReused(),
}
"""Every codec by name, with its default options."""

_OPTIONS = {option for options in CODEC_OPTIONS.values() for option in options}


def parse(name: str, options: Mapping[str, float] | None = None) -> Settings:
    """Settings of the codec called `name`, which may carry options (`int8:block=256`).

    `options` may be meant for an edge's two directions: a codec takes those that it has. Options in the name must fit.
    Raises `PlanError` for an unknown codec, an option that no codec has, or a value out of range.
    """
    try:
        base, written = read_codec(name)
    except ValueError as error:
        raise PlanError(str(error)) from None
    for key in options or {}:
        if key not in _OPTIONS:
            raise PlanError(f"no codec has an option {key!r}; known: {', '.join(sorted(_OPTIONS))}")
    own = {key: value for key, value in (options or {}).items() if key in CODEC_OPTIONS[base]}
    chosen = {**own, **written}
    _check(base, **chosen)
    settings = CODECS[base]
    return replace(settings, **{key: type(getattr(settings, key))(value) for key, value in chosen.items()})
