"""Consolidated checkpoints: fragments' parts become one `model.safetensors` and one `optimizer.safetensors`.

A checkpoint does not know the plan: `model.safetensors` has every key of `model.state_dict()` (aliases of tied parameters
as copies, entries that the captured graph does not use from the initial weights), and nothing else.
`optimizer.safetensors` has `optimizer/SLOT/NAME`, `buffer/NAME` for non-persistent buffers that training writes, and
`feedback/PLAN/EDGE/DIRECTION` for what codecs with error feedback have left over.
Everything here blocks; it is called from a thread.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from coordinator.storage.blobs import BlobStore, DiskFullError, is_disk_full, sync_directory
from coordinator.storage.tensorfile import StoredTensor, Written, read_header, write
from dag.graph import OpDag
from fusion.errors import BlobError
from fusion.messages import BlobRef
from fusion.units import format_bytes

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
_CONSTANT = "constant/"
_UNFINISHED = ".writing-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One written checkpoint; both files are blobs too."""

    job: str
    step: int
    model: BlobRef
    optimizer: BlobRef

    @property
    def size(self) -> int:
        return self.model.size + self.optimizer.size


def state_keys(dag: OpDag, weights: Mapping[str, StoredTensor]) -> dict[str, str]:
    """State-dict key -> the key that holds its value: the canonical name for aliases of a tied parameter, else itself."""
    transient = _transient(dag)
    keys = {key: key for key in weights if not key.startswith(_CONSTANT) and key not in transient}
    for parameter in dag.parameters:
        for name in (parameter.name, *parameter.aliases):
            keys[name] = parameter.name
    for buffer, aliases in dag.buffer_aliases:
        if buffer not in transient:
            for name in (buffer, *aliases):
                keys[name] = buffer
    return keys


def _transient(dag: OpDag) -> set[str]:
    """Constants and non-persistent buffers: in the weights blob, not in the state dict."""
    persistent = set(dag.persistent_buffers)
    return {
        op.target for op in dag.ops if op.kind == "constant" or (op.kind == "buffer" and op.target not in persistent)
    }


def collect(
    dag: OpDag, weights: Mapping[str, StoredTensor], parts: Mapping[int, Mapping[str, StoredTensor]]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """The tensors of the model file and of the optimizer file. Raises `BlobError` when something is missing."""
    trained: dict[str, StoredTensor] = {}
    optimizer: dict[str, StoredTensor] = {}
    transient = _transient(dag)
    for fragment, tensors in sorted(parts.items()):
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "buffer" and name in transient:
                optimizer[key] = tensor  # Written in training but not of the state dict: needed to go on, not to load.
            elif kind in ("parameter", "buffer"):
                trained[name] = tensor
            elif kind in ("optimizer", "feedback"):
                optimizer[key] = tensor
            else:
                raise BlobError(f"part of fragment {fragment} has an unknown key {key!r}")
    model: dict[str, StoredTensor] = {}
    for key, source in state_keys(dag, weights).items():
        value = trained.get(source) or weights.get(source)
        if value is None:
            raise BlobError(f"no fragment sent a value for {source!r}")
        model[key] = value
    for parameter in dag.parameters:
        op = dag.ops[parameter.op]
        if parameter.name not in trained and dag.users[parameter.op]:
            raise BlobError(f"no fragment sent the parameter {parameter.name!r}")
        if model[parameter.name].shape != op.meta.shape:
            raise BlobError(f"{parameter.name!r} came with shape {model[parameter.name].shape}, not {op.meta.shape}")
    return model, optimizer


class Checkpoints:
    """Checkpoints under `root/JOB/STEP/`."""

    def __init__(self, root: Path, blobs: BlobStore) -> None:
        self.root = root
        self._blobs = blobs
        root.mkdir(parents=True, exist_ok=True)

    def folder(self, job: str, step: int) -> Path:
        return self.root / job / str(step)

    def consolidate(
        self, job: str, step: int, dag: OpDag, weights: BlobRef, parts: Mapping[int, BlobRef]
    ) -> Checkpoint:
        """Write the checkpoint, whole or not at all.

        Raises `BlobError` (a part is missing or malformed) or `DiskFullError`.
        """
        base = read_header(self._blobs.require(weights, "weights"), "weights")
        headers = {
            fragment: read_header(self._blobs.require(ref, f"part {fragment}"), f"part {fragment}")
            for fragment, ref in parts.items()
        }
        model, optimizer = collect(dag, base, headers)
        target = self.folder(job, step)
        temporary = target.parent / f"{_UNFINISHED}{step}"
        shutil.rmtree(temporary, ignore_errors=True)
        needed = sum(tensor.length for tensors in (model, optimizer) for tensor in tensors.values())
        try:
            temporary.mkdir(parents=True)
            metadata = {"format": "pt", "job": job, "step": str(step)}
            written_model = write(temporary / MODEL_FILE, model, metadata)
            written_optimizer = write(temporary / OPTIMIZER_FILE, optimizer, metadata)
            sync_directory(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            sync_directory(target.parent)
            self._blobs.adopt(target / MODEL_FILE, written_model.digest)
            self._blobs.adopt(target / OPTIMIZER_FILE, written_optimizer.digest)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(
                    f"no room for {format_bytes(needed)} in {self.root} ({error.strerror}); free some space there"
                ) from None
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return Checkpoint(job, step, _ref(written_model), _ref(written_optimizer))

    def remove(self, job: str, step: int) -> None:
        shutil.rmtree(self.folder(job, step), ignore_errors=True)

    def jobs(self) -> list[str]:
        """Those that have had a checkpoint."""
        return [path.name for path in self.root.iterdir() if path.is_dir()]

    def steps(self, job: str) -> list[int]:
        """Of the checkpoints of a job that are here."""
        return [int(path.name) for path in (self.root / job).iterdir() if path.name.isascii() and path.name.isdigit()]

    def remove_unfinished(self, job: str) -> None:
        """What was being written when an earlier process ended."""
        for path in (self.root / job).glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def merged_weights(self, dag: OpDag, weights: BlobRef, model: BlobRef, optimizer: BlobRef | None) -> BlobRef:
        """A weights blob to start from: the job's own, with every value that the checkpoint has.

        Constants and read-only non-persistent buffers are not in a checkpoint and come from the job's own blob. Raises
        `BlobError` when the checkpoint is not of this model, or `DiskFullError`.
        """
        base = read_header(self._blobs.require(weights, "weights"), "weights")
        trained = read_header(self._blobs.require(model, "checkpoint"), "checkpoint")
        keys = state_keys(dag, base)
        merged = dict(base)
        for key, source in keys.items():
            value = trained.get(key)
            if value is None:
                raise BlobError(f"the checkpoint is not of this model: it lacks {key!r}")
            known = base.get(key) or base.get(source)
            if known is None or (value.dtype, value.shape) != (known.dtype, known.shape):
                ours = "absent" if known is None else f"{known.torch_dtype} {list(known.shape)}"
                raise BlobError(
                    f"the checkpoint is not of this model: {key!r} is {value.torch_dtype} {list(value.shape)} there, "
                    f"{ours} in the model"
                )
            if key in base:
                merged[key] = value
        strangers = sorted(set(trained) - set(keys))
        if strangers:
            raise BlobError(f"the checkpoint is not of this model: the model has no {strangers[0]!r}")
        if optimizer is not None:
            for key, value in read_header(self._blobs.require(optimizer, "optimizer"), "optimizer").items():
                kind, _, name = key.partition("/")
                if kind == "buffer" and name in base and name not in keys:
                    merged[name] = value
        temporary = self._blobs.temporary()
        try:
            written = write(temporary, merged, {"format": "pt"})
            self._blobs.adopt(temporary, written.digest)
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(f"no room for {format_bytes(model.size)} in {self._blobs.root}") from None
            raise
        finally:
            temporary.unlink(missing_ok=True)
        return _ref(written)


def _ref(written: Written) -> BlobRef:
    return BlobRef(digest=written.digest, size=written.size)
