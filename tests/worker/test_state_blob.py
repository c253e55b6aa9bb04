"""A state blob is safetensors to the last byte, made without a second copy of the tensors."""

from __future__ import annotations

import hashlib
import tracemalloc
import zlib

import safetensors.torch
import torch

from worker.jobs.state_blob import StateBlob


def test_safetensors_reads_it_back() -> None:
    tensors = {
        "parameter/a": torch.randn(300_000),
        "parameter/b": torch.randn(3, 5).to(torch.bfloat16),
        "buffer/count": torch.tensor(7),
        "buffer/flags": torch.tensor([True, False, True]),
        "buffer/empty": torch.empty(0, 4),
        "optimizer/exp_avg/a": torch.randn(2, 2, dtype=torch.float64),
    }
    blob = StateBlob(tensors)
    data = b"".join(blob.pieces())
    read = safetensors.torch.load(data)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    assert blob.ref().size == blob.size == len(data)
    assert blob.checksum() == zlib.crc32(data)
    assert blob.ref().digest == hashlib.sha256(data).hexdigest()
    for piece in (1000, 4096, 2**20):
        assert b"".join(blob.read(begin, begin + piece) for begin in range(0, len(data), piece)) == data
    assert blob.read(len(data), len(data) + 5) == b""


def test_no_tensors_make_a_blob_too() -> None:
    assert safetensors.torch.load(b"".join(StateBlob({}).pieces())) == {}


def test_pieces_share_the_tensors_memory() -> None:
    state = {"x": torch.zeros(8 * 2**20)}
    blob = StateBlob(state)
    tracemalloc.start()
    assert sum(len(piece) for piece in blob.pieces()) > 32 * 2**20
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
