"""Feeds fragments from the data: the placeholders of any micro-batch, in the order that `fusion.sampling` defines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dag.graph import OpDag
from fusion.errors import DataError
from fusion.messages import DataManifest, TrainConfig
from fusion.sampling import SampleOrder, evaluation_batch, evaluation_batches
from worker.jobs.fetch import TensorFile

TOKENS = "tokens"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a placeholder's values come from, and what they must look like."""

    tensor: str
    role: Literal["array", "inputs", "targets"]
    shape: tuple[int, ...]
    dtype: torch.dtype


def sources(
    dag: OpDag, placeholders: Iterable[int], manifest: DataManifest, micro_batch_size: int
) -> dict[str, Source]:
    """Data key -> source, for these placeholder ops. Raises `DataError` when the data has nothing for one."""
    found: dict[str, Source] = {}
    for index in placeholders:
        op = dag.ops[index]
        tensor = manifest.feeds.get(op.target, op.target)
        role: Literal["array", "inputs", "targets"] = "array"
        if manifest.kind == "tokens":
            if tensor not in ("inputs", "targets"):
                raise DataError(f"token data feeds `inputs` and `targets`, the model also wants {op.target!r}")
            role = "inputs" if tensor == "inputs" else "targets"
            tensor = TOKENS
        if not op.meta.shape or op.meta.shape[0] != micro_batch_size:
            raise DataError(
                f"{op.target!r} was captured with shape {list(op.meta.shape)}; its first axis must be the micro-batch "
                f"of {micro_batch_size}"
            )
        found[op.target] = Source(tensor, role, op.meta.shape, getattr(torch, op.meta.dtype))
    return found


class Feed:
    """Micro-batches for the placeholders of one worker's fragments; holds only the tensors that they read."""

    def __init__(
        self, sources: Mapping[str, Source], tensors: Mapping[str, Tensor], manifest: DataManifest, train: TrainConfig
    ) -> None:
        self._sources = sources
        # Source -> its samples along the first axis; samples of tokens are views.
        self._samples: dict[Source, Tensor] = {}
        self._manifest = manifest
        self._train = train
        self._order = SampleOrder(train.seed, manifest.train_samples, train.micro_batches, train.micro_batch_size)
        length = manifest.sequence_length or 0
        if manifest.kind == "tokens" and length < 1:
            raise DataError("token data needs a sequence_length")
        for key, source in sources.items():
            tensor = tensors[source.tensor]
            sample = (length,) if source.role != "array" else tuple(tensor.shape[1:])
            held = len(tensor) if source.role == "array" else (len(tensor) - 1) // length
            if sample != source.shape[1:]:
                raise DataError(f"samples of {key!r} have shape {list(sample)}, captured were {list(source.shape[1:])}")
            if held < manifest.samples:
                raise DataError(f"{key!r} has {held} samples, the job says {manifest.samples}")
            if source.role != "array":
                first = 1 if source.role == "targets" else 0
                tensor = tensor[first : first + held * length].view(held, length)
            self._samples[source] = tensor
        if train.eval_every is not None:
            whole = evaluation_batches(manifest.samples, manifest.train_samples, train.micro_batch_size)
            if whole < train.eval_batches:
                raise DataError(
                    f"{train.eval_batches} evaluation batches asked for, the held-out samples fill {whole} of "
                    f"{train.micro_batch_size}"
                )

    def training(self, step: int, micro_batch: int, keys: Iterable[str]) -> dict[str, Tensor]:
        """Placeholder -> values of one micro-batch."""
        return self._gather(torch.from_numpy(self._order.micro_batch(step, micro_batch)), keys)

    def evaluation(self, batch: int, keys: Iterable[str]) -> dict[str, Tensor]:
        """Placeholder -> values of one held-out batch."""
        size = self._train.micro_batch_size
        return self._gather(torch.from_numpy(evaluation_batch(batch, self._manifest.train_samples, size)), keys)

    def _gather(self, samples: Tensor, keys: Iterable[str]) -> dict[str, Tensor]:
        chosen = {key: self._sources[key] for key in keys}
        return {key: self._samples[source].index_select(0, samples).to(source.dtype) for key, source in chosen.items()}


async def load_feed(
    file: TensorFile | None, sources: Mapping[str, Source], manifest: DataManifest, train: TrainConfig
) -> Feed:
    """Fetch the tensors that `sources` read, and no others. `file` may be None when there are no sources."""
    tensors = await file.tensors(source.tensor for source in sources.values()) if file is not None else {}
    return Feed(sources, tensors, manifest, train)
