"""Consolidated checkpoints: the right keys, any dtype byte for byte, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from coordinator_cases import (
    FakeWorker,
    Server,
    floats,
    job_record,
    job_spec,
    part_blob,
    ref_of,
    tensors_file,
    tiny_dag,
    weights_blob,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from coordinator.archive import Archive
from coordinator.storage import checkpoints as module
from coordinator.storage.blobs import BlobStore, DiskFullError
from coordinator.storage.checkpoints import Checkpoint, Checkpoints
from coordinator.storage.store import Store
from coordinator.storage.tensorfile import DTYPES, StoredTensor, read_header, write
from fusion.errors import BlobError
from fusion.messages import BlobRef


class Files:
    """A blob store and checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        self.blobs = BlobStore(folder / "blobs", 2**30)
        self.checkpoints = Checkpoints(folder / "checkpoints", self.blobs)

    def put(self, content: bytes) -> BlobRef:
        ref = ref_of(content)
        temporary = self.blobs.temporary()
        temporary.write_bytes(content)
        self.blobs.adopt(temporary, ref.digest)
        temporary.unlink()
        return ref

    def raw(self, tensor: StoredTensor) -> bytes:
        return tensor.path.read_bytes()[tensor.start : tensor.start + tensor.length]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_model_file_has_the_keys_of_the_state_dict(files: Files) -> None:
    weights = files.put(weights_blob())
    parts = {index: files.put(part_blob(index, 2, 7)) for index in (0, 1)}
    written = files.checkpoints.consolidate("job", 7, tiny_dag(), weights, parts)
    folder = files.checkpoints.folder("job", 7)
    model = read_header(folder / "model.safetensors")
    assert set(model) == {"first.weight", "second.weight", "head.weight", "unused.half"}
    assert files.raw(model["head.weight"]) == files.raw(model["first.weight"]) == floats(7, 1, 1, 1)
    assert model["unused.half"].dtype == "BF16"
    assert files.raw(model["unused.half"]) == bytes(range(6))
    optimizer = read_header(folder / "optimizer.safetensors")
    assert set(optimizer) == {"optimizer/step/f0", "optimizer/step/f1", "optimizer/exp_avg/first.weight"}
    content = (folder / "model.safetensors").read_bytes()
    assert written.model == BlobRef(digest=hashlib.sha256(content).hexdigest(), size=len(content))
    assert files.blobs.size(written.optimizer.digest) == written.optimizer.size
    with safe_open(folder / "model.safetensors", "numpy") as library:
        assert library.metadata() == {"format": "pt", "job": "job", "step": "7"}


def test_the_checkpoint_from_which_a_run_began_stays_beside_the_newest(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "store.sqlite")) as store:
        blobs = BlobStore(tmp_path / "blobs", 2**30)
        archive = Archive(store, blobs, Checkpoints(tmp_path / "checkpoints", blobs), lambda _: False)
        gone = []
        for step in (10, 20, 30, 40):
            ref = BlobRef(digest=f"{step:064x}", size=1)
            gone += archive.record(Checkpoint("job", step, ref, ref), 0.0, 2, needed=10)
        assert gone == [20]
        assert [item["step"] for item in store.checkpoints("job")] == [10, 30, 40]


def test_merged_weights_keep_what_a_checkpoint_does_not_have(files: Files) -> None:
    weights = files.put(weights_blob())
    parts = {0: files.put(part_blob(0, 1, 3))}
    written = files.checkpoints.consolidate("job", 3, tiny_dag(), weights, parts)
    merged = files.checkpoints.merged_weights(tiny_dag(), weights, written.model, written.optimizer)
    header = read_header(files.blobs.path(merged.digest))
    assert set(header) == set(read_header(files.blobs.path(weights.digest)))
    assert files.raw(header["first.weight"]) == floats(3, 1, 1, 1)
    assert files.raw(header["scale"]) == floats(9, 9)
    assert files.raw(header["constant/shift"]) == floats(0.5, 0.5)


@pytest.mark.parametrize("first_ends", ["before the second goes on", "after that"])
def test_equal_jobs_that_go_on_from_equal_weights_keep_them_for_each_other(
    files: Files, tmp_path: Path, first_ends: str
) -> None:
    weights = files.put(weights_blob())
    parts = {0: files.put(part_blob(0, 1, 3))}
    jobs = [job_record(job_spec(), id=f"job-{number}").model_copy(update={"weights": weights}) for number in (1, 2)]
    found = [files.checkpoints.consolidate(job.id, 3, tiny_dag(), weights, parts) for job in jobs]
    with contextlib.closing(Store(tmp_path / "store.sqlite")) as store:
        archive = Archive(store, files.blobs, files.checkpoints, lambda _: False)
        merged = archive.weights_after(jobs[0], tiny_dag(), found[0])
        if first_ends == "before the second goes on":
            archive.job_ended("job-1")
            os.utime(files.blobs.path(merged.digest), (0, 0))  # It was made long ago.
        assert archive.weights_after(jobs[1], tiny_dag(), found[1]) == merged
        archive.job_ended("job-1")
        archive.collect(time.time() + 100)
        assert files.blobs.size(merged.digest) == merged.size
        archive.job_ended("job-2")
        os.utime(files.blobs.path(merged.digest), (0, 0))
        archive.collect(time.time() + 100)
        assert files.blobs.size(merged.digest) is None


def test_weights_of_a_job_that_ends_while_they_are_made_are_not_kept(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = files.put(weights_blob())
    job = job_record(job_spec()).model_copy(update={"weights": weights})
    found = files.checkpoints.consolidate(job.id, 3, tiny_dag(), weights, {0: files.put(part_blob(0, 1, 3))})
    merge = files.checkpoints.merged_weights
    with contextlib.closing(Store(tmp_path / "store.sqlite")) as store:
        archive = Archive(store, files.blobs, files.checkpoints, lambda _: False)

        def slowly(*args: Any) -> BlobRef:
            merged = merge(*args)
            job.state = "cancelled"
            archive.job_ended(job.id)
            return merged

        monkeypatch.setattr(files.checkpoints, "merged_weights", slowly)
        merged = archive.weights_after(job, tiny_dag(), found)
        os.utime(files.blobs.path(merged.digest), (0, 0))
        archive.collect(time.time() + 100)
        assert files.blobs.size(merged.digest) is None


def test_an_old_checkpoint_that_an_earlier_process_had_no_time_to_remove_is_removed(
    files: Files, tmp_path: Path
) -> None:
    weights = files.put(weights_blob())
    with contextlib.closing(Store(tmp_path / "store.sqlite")) as store:
        archive = Archive(store, files.blobs, files.checkpoints, lambda _: False)
        written = {}
        for step in (10, 20, 30, 40):
            parts = {index: files.put(part_blob(index, 2, step)) for index in (0, 1)}
            written[step] = files.checkpoints.consolidate("job", step, tiny_dag(), weights, parts)
        for step in (10, 20, 30):
            archive.record(written[step], 0.0, 1, needed=10)
        store.commit()
        (files.checkpoints.folder("job", 0).parent / ".writing-40").mkdir()
        # Killed here: 20 is out of the books, and 40, which is not in them yet, is of use to people.
        after = Archive(store, files.blobs, files.checkpoints, lambda _: False)
        after.sweep()
        assert sorted(int(path.name) for path in files.checkpoints.folder("job", 0).parent.iterdir()) == [10, 30, 40]
        for digest in (written[20].model.digest, written[20].optimizer.digest):
            os.utime(files.blobs.path(digest), (0, 0))
        after.collect(time.time() + 100)
        assert files.blobs.size(written[20].model.digest) is None
        assert files.blobs.size(written[30].model.digest) is not None


def test_what_is_made_a_blob_again_is_not_collected_for_an_earlier_drop(files: Files, tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path / "store.sqlite")) as store:
        archive = Archive(store, files.blobs, files.checkpoints, lambda _: False)
        ref = files.put(b"weights")
        archive.drop([ref.digest])
        os.utime(files.blobs.path(ref.digest), (0, 0))
        files.put(b"weights")
        archive.collect(time.time() + 100)
        assert files.blobs.size(ref.digest) == ref.size


def test_two_that_make_the_same_blob_at_once_both_have_it(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal jobs that go on from equal weights, each on a thread of its own."""
    content, keep = b"weights", BlobStore._keep
    meanwhile = [lambda: files.put(content)]

    def slowly(self: BlobStore, temporary: Path, target: Path) -> None:
        while meanwhile:
            meanwhile.pop()()
        keep(self, temporary, target)

    monkeypatch.setattr(BlobStore, "_keep", slowly)
    ref = files.put(content)
    assert files.blobs.path(ref.digest).read_bytes() == content
    assert not list((files.blobs.root / "incoming").iterdir())


def test_a_written_buffer_outside_the_state_dict_survives_a_restart(files: Files) -> None:
    weights = files.put(weights_blob())
    part = tensors_file(
        {
            "parameter/first.weight": ("F32", (2, 2), floats(1, 1, 1, 1)),
            "parameter/second.weight": ("F32", (2, 2), floats(2, 2, 2, 2)),
            "buffer/scale": ("F32", (2,), floats(5, 6)),
        }
    )
    written = files.checkpoints.consolidate("job", 3, tiny_dag(), weights, {0: files.put(part)})
    assert "scale" not in read_header(files.blobs.path(written.model.digest))
    merged = files.checkpoints.merged_weights(tiny_dag(), weights, written.model, written.optimizer)
    assert files.raw(read_header(files.blobs.path(merged.digest))["scale"]) == floats(5, 6)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"parameter/second.weight": ("F32", (2, 2), floats(1, 2, 3, 4))}, "no fragment sent the parameter"),
        ({"parameter/first.weight": ("F32", (4,), floats(1, 2, 3, 4))}, "first.weight"),
        ({"other/first.weight": ("F32", (4,), floats(1, 2, 3, 4))}, "unknown key"),
    ],
)
def test_bad_parts_make_no_checkpoint(
    files: Files, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], words: str
) -> None:
    weights = files.put(weights_blob())
    with pytest.raises(BlobError, match=words):
        files.checkpoints.consolidate(
            "job", 1, tiny_dag(), weights, {0: files.put(tensors_file(tensors)), 1: files.put(part_blob(1, 2, 1))}
        )
    assert not files.checkpoints.folder("job", 1).exists()


def test_a_full_disk_leaves_nothing_behind(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = files.put(weights_blob())

    def full(target: Path, *_: object) -> None:
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write", full)
    with pytest.raises(DiskFullError, match="No space left on device"):
        files.checkpoints.consolidate("job", 1, tiny_dag(), weights, {0: files.put(part_blob(0, 1, 1))})
    assert not list((files.checkpoints.root / "job").iterdir())


async def test_a_run_goes_on_when_its_checkpoints_find_a_full_disk(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write", full)
    async with FakeWorker(server, "a"):
        job = await server.submit(checkpoint={"every": 2})
        done = await server.until_state(job["id"], "done")
    assert (done["step"], done["checkpoint"]) == (6, None)
    _, events = await server.call("GET", f"/api/v1/jobs/{job['id']}/events")
    stories = [event["message"] for event in events["events"] if event["event"] == "checkpoint-failed"]
    assert len(stories) == 3
    assert "No space left on device" in stories[0]
    assert stories[0].endswith("training goes on")
    assert any(event["event"] == "checkpoint-missing" for event in events["events"])


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_files_survive_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, layout: dict[str, tuple[str, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("round")
    tensors = {}
    for number, (name, (dtype, shape)) in enumerate(layout.items()):
        length = DTYPES[dtype][1]
        for size in shape:
            length *= size
        tensors[name] = (dtype, tuple(shape), bytes([number + 1]) * length)
    source = folder / "source"
    source.write_bytes(tensors_file(tensors))
    copy = folder / "copy"
    written = write(copy, read_header(source), {"format": "pt"})
    assert written.size == copy.stat().st_size
    read = read_header(copy)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in read.items()} == {
        name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()
    }
    content = copy.read_bytes()
    for name, (_, _, raw) in tensors.items():
        assert content[read[name].start : read[name].start + read[name].length] == raw
        assert read[name].start % DTYPES[read[name].dtype][1] == 0
    with safe_open(copy, "numpy") as library:
        assert set(library.keys()) == set(tensors)


@given(st.binary(max_size=200))
def test_garbage_is_refused_in_words(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("garbage") / "file"
    path.write_bytes(content)
    with contextlib.suppress(BlobError):  # Nothing else may be raised.
        read_header(path)
