"""What every kind of data becomes: tensors by name, a manifest, and the blob that workers read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from fusion.data.separate import separate
from fusion.errors import DataError
from fusion.messages import BlobRef, DataManifest
from fusion.spec import TrainSpec

TOKENS = "tokens"


@dataclass(frozen=True)
class RawData:
    """Checked tensors before they become a blob.

    `arrays`: `tensors` maps a placeholder to its array, first axis the sample. `tokens`: `tensors["tokens"]` is 1-D int64.
    """

    kind: Literal["arrays", "tokens"]
    tensors: Mapping[str, Tensor]
    where: str
    """What to call this data in errors, e.g. `data.text corpus.txt`."""
    holdout: float = 0.0
    sequence_length: int | None = None

    @property
    def samples(self) -> int:
        if self.sequence_length is not None:
            return max(0, (len(self.tensors[TOKENS]) - 1) // self.sequence_length)
        return len(next(iter(self.tensors.values())))


@dataclass(frozen=True)
class PreparedData:
    """The data of a job, ready to upload, and one micro-batch of it to capture the model with."""

    manifest: DataManifest
    blob: bytes
    example: Mapping[str, Tensor]
    """Placeholder -> tensor of one micro-batch; all distinct tensors, though two placeholders may read the same array."""


def assemble(raw: RawData, train: TrainSpec, feeds: Mapping[str, str]) -> PreparedData:
    """Split off the held-out samples (only with `eval_every`), check the counts, and write the blob.

    `feeds` maps each placeholder to an array, or to `inputs`/`targets` of tokens. Raises `DataError`.
    """
    from dag.serialize import digest

    samples, size = raw.samples, train.micro_batch_size
    held_out = int(samples * raw.holdout) if train.eval_every else 0
    train_samples = samples - held_out
    if train_samples < size:
        kept = f" ({held_out} of {samples} are held out for evaluation)" if held_out else ""
        raise DataError(
            f"{raw.where}: {_count(train_samples)} to train on{kept}, fewer than one micro-batch of {size}; "
            f"give more data, or a smaller train.micro_batch"
        )
    if train.eval_every and held_out < size:
        raise DataError(
            f"{raw.where}: holdout {raw.holdout:g} of {_count(samples)} keeps {held_out} for evaluation, fewer than one "
            f"micro-batch of {size}; raise data.holdout, or leave out train.eval_every"
        )
    blob = save(separate({name: narrowed(tensor) for name, tensor in raw.tensors.items()}))
    manifest = DataManifest(
        kind=raw.kind,
        blob=BlobRef(digest=digest(blob), size=len(blob)),
        samples=samples,
        train_samples=train_samples,
        sequence_length=raw.sequence_length,
        feeds=dict(feeds),
    )
    return PreparedData(manifest, blob, {name: _example(raw, source, size) for name, source in feeds.items()})


def _example(raw: RawData, source: str, size: int) -> Tensor:
    if raw.sequence_length is None:
        return raw.tensors[source][:size].clone()
    length = raw.sequence_length
    shift = 1 if source == "targets" else 0
    return raw.tensors[TOKENS][shift : shift + size * length].reshape(size, length).clone()


def narrowed(tensor: Tensor) -> Tensor:
    """int64 as the smallest of uint8, int8, int16 and int32 that holds all values; everything else as it is.

    Workers widen what they feed to the placeholder's dtype; until then it crosses links and stays in memory.
    """
    if tensor.dtype != torch.int64 or not tensor.numel():
        return tensor
    least, greatest = (int(bound) for bound in torch.aminmax(tensor))
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        held = torch.iinfo(dtype)
        if held.min <= least and greatest <= held.max:
            return tensor.to(dtype)
    return tensor


def _count(samples: int) -> str:
    return "1 sample" if samples == 1 else f"{samples} samples"


INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32})
FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})


def plain_tensor(tensor: Tensor, where: str) -> Tensor:
    """The dtypes models are fed with: float64 becomes float32, integers become int64 (what embeddings and class targets
    take), float32, float16, bfloat16 and bool stay. Raises `DataError`."""
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        raise DataError(f"{where}: is a {str(tensor.layout).removeprefix('torch.')} tensor; give a dense one")
    if tensor.dtype == torch.float64:
        tensor = tensor.to(torch.float32)
    elif tensor.dtype in INTEGERS:
        tensor = tensor.to(torch.int64)
    elif tensor.dtype == torch.uint64:
        tensor = tensor.contiguous().view(torch.int64)
        if (tensor < 0).any():
            raise DataError(f"{where}: holds integers of 2^63 or more; models are fed int64, give smaller ones")
    elif tensor.dtype not in FLOATS and tensor.dtype != torch.bool:
        name = str(tensor.dtype).removeprefix("torch.")
        raise DataError(f"{where}: dtype {name} can't be fed to a model; give floats, integers or booleans")
    return tensor.contiguous()
