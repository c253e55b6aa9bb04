"""The store: migrations, what survives, who needs a blob."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from coordinator_cases import job_record, job_spec, ref_of

from coordinator.life.jobs import Job, Metric
from coordinator.storage.store import MIGRATIONS, Store
from fusion.errors import ServiceError
from fusion.plan import CodecChoice, Plan


def _job() -> Job:
    return job_record(job_spec(), id="tiny-1")


def test_everything_survives(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    job = _job()
    job.plan = Plan(
        policy="x", cuts=(2,), placement=("a", "b"), in_flight=(2, 1), codecs={3: CodecChoice(forward="bf16")}
    )
    job.parts = {2: {0: ref_of(b"part")}}
    store.save_job(job)
    store.save_plan(job.id, job.plan)
    store.add_metric(job.id, Metric(step=1, loss=float("nan"), step_seconds=0.5, sent_bytes=3, epoch=0))
    store.add_metric(job.id, Metric(step=1, loss=7.0, step_seconds=0.5, sent_bytes=3, epoch=1))
    store.add_event(12.0, job.id, "started", "it starts", {"step": 0})
    store.add_event(13.0, None, "joined", "a worker", {})
    store.close()
    again = Store(tmp_path / "db")
    assert again.jobs() == [job]
    assert again.plans(job.id) == [job.plan]
    # The first report of a step stands; JSON has no NaN.
    assert again.metrics(job.id) == [{"step": 1, "loss": None, "step_seconds": 0.5, "sent_bytes": 3, "epoch": 0}]
    assert [event["message"] for event in again.events()] == ["it starts", "a worker"]
    assert again.events(job.id) == [
        {"seq": 1, "time": 12.0, "job": job.id, "step": 0, "event": "started", "message": "it starts"}
    ]
    assert again.events(job.id, after=1) == []


def test_a_job_that_a_newer_version_would_refuse_is_left_out_and_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    store.save_job(_job())
    bad = _job().model_copy(update={"id": "tiny-7", "number": 7})
    bad.spec = bad.spec.model_copy(
        update={"compression": bad.spec.compression.model_copy(update={"forward": "int4:block=7"})}
    )
    store.save_job(bad)
    store.close()
    again = Store(tmp_path / "db")
    assert [job.id for job in again.jobs()] == ["tiny-1"]
    assert list(again.unreadable) == ["tiny-7"]
    assert "block" in again.unreadable["tiny-7"]
    assert again.highest_number() == 7


def test_what_was_not_committed_is_gone_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    store.add_event(1.0, None, "a", "a", {})
    store.commit()
    store.add_event(2.0, None, "b", "b", {})
    other = Store(tmp_path / "db")
    assert [event["event"] for event in other.events()] == ["a"]


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "db").close()
    with sqlite3.connect(tmp_path / "db") as connection:
        connection.execute("INSERT INTO schema_version VALUES (?)", (len(MIGRATIONS) + 1,))
    with pytest.raises(ServiceError, match="update Fusion"):
        Store(tmp_path / "db")


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "db").write_bytes(b"no database at all" * 100)
    with pytest.raises(ServiceError, match=r"can't open .*; the file is damaged: put a copy"):
        Store(tmp_path / "db")


@pytest.mark.parametrize(
    ("code", "free", "advised"),
    [
        (sqlite3.SQLITE_FULL, 2**30, True),
        (sqlite3.SQLITE_IOERR, 2**10, True),
        (sqlite3.SQLITE_IOERR, 2**30, False),
        (sqlite3.SQLITE_BUSY, 2**10, False),
    ],
)
def test_a_store_that_can_not_be_opened_for_lack_of_room_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, free: int, advised: bool
) -> None:
    def connect(*_: object, **__: object) -> sqlite3.Connection:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = code
        raise error

    monkeypatch.setattr(sqlite3, "connect", connect)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(ServiceError, match="disk I/O error") as refused:
        Store(tmp_path / "db")
    assert ("make room on that disk" in str(refused.value)) is advised


def test_a_blob_is_needed_until_its_last_owner_lets_go(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    store.pin("job/1", ["a", "b"])
    store.pin("job/2", ["b"])
    assert store.unpin("job/1") == ["a"]
    assert store.pinned("b")
    assert store.unpin("job/2") == ["b"]
    assert not store.pinned("b")


# When nothing can be written --------------------------------------------------------------------------------------


def _be_full(store: Store, full: bool) -> None:
    """Take all room away, or give it back. SQLite itself then undoes a transaction whole, as on a full disk."""
    (used,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count={used if full else 10**6}")


def test_what_a_full_disk_does_not_take_waits_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    assert store.add_event(1.0, None, "a", "a", {})["seq"] == 1
    store.commit()
    _be_full(store, True)
    for number in range(2, 12):
        assert store.add_event(2.0, "j", "b", "x" * 9000, {})["seq"] == number
        store.add_metric("j", Metric(step=number, loss=0.5, step_seconds=0.5, sent_bytes=3, epoch=0))
        store.commit()
    assert store.behind == "database or disk is full"
    assert not store.catch_up()
    assert not store.broken
    assert Store(tmp_path / "db").events(after=1) == []
    _be_full(store, False)
    assert store.catch_up()
    assert store.behind is None
    store.add_event(3.0, None, "c", "c", {})
    store.close()
    again = Store(tmp_path / "db")
    assert [event["seq"] for event in again.events()] == list(range(1, 13))
    assert [metric["step"] for metric in again.metrics("j")] == list(range(2, 12))


def test_another_process_that_holds_the_file_is_waited_for(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    other = sqlite3.connect(tmp_path / "db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store.save_job(_job())
    store.commit()
    assert store.behind == "database is locked"
    assert store.jobs() == []
    other.execute("COMMIT")
    assert store.catch_up()
    assert Store(tmp_path / "db").jobs() == [_job()]


def test_a_file_that_may_not_be_written_is_given_up(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    store._db.execute("PRAGMA query_only=1")
    store.add_event(1.0, None, "a", "a", {})
    assert "readonly" in (store.behind or "")
    assert store.broken
    assert not store.catch_up()


def test_a_mistake_of_ours_is_no_trouble_of_the_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "db")
    store.save_job(_job())
    with pytest.raises(sqlite3.IntegrityError):
        store.save_job(_job().model_copy(update={"id": "tiny-1-again"}))
    store.commit()
    assert store.behind is None
    assert Store(tmp_path / "db").jobs() == [_job()]
