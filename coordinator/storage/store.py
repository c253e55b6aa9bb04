"""What survives a restart, in SQLite (WAL): jobs, plans, metrics, events, logs, checkpoints, workers, blob pins, tokens.

One connection, used from the event loop's thread only. Writes between two `commit`s are one transaction. What can't be
written for now, on a full disk say, is kept in memory until `catch_up` has written it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from coordinator.entry.tokens import Token
from coordinator.life.jobs import Job, Metric
from coordinator.life.pool import Member
from coordinator.storage.blobs import is_disk_full
from fusion.errors import ServiceError
from fusion.plan import Plan

# One script per schema version; a released script is never edited, a new one is appended.
MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE jobs (id TEXT PRIMARY KEY, number INTEGER NOT NULL UNIQUE, record TEXT NOT NULL);
    CREATE TABLE plans (job TEXT NOT NULL, epoch INTEGER NOT NULL, plan TEXT NOT NULL, PRIMARY KEY (job, epoch));
    CREATE TABLE metrics (job TEXT NOT NULL, step INTEGER NOT NULL, data TEXT NOT NULL, PRIMARY KEY (job, step))
        WITHOUT ROWID;
    CREATE TABLE events (seq INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, job TEXT, data TEXT NOT NULL);
    CREATE INDEX events_by_job ON events (job, seq);
    CREATE TABLE logs (seq INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, job TEXT, data TEXT NOT NULL);
    CREATE INDEX logs_by_job ON logs (job, seq);
    CREATE TABLE checkpoints (job TEXT NOT NULL, step INTEGER NOT NULL, data TEXT NOT NULL, PRIMARY KEY (job, step));
    CREATE TABLE workers (name TEXT PRIMARY KEY, record TEXT NOT NULL);
    CREATE TABLE pins (digest TEXT NOT NULL, owner TEXT NOT NULL, PRIMARY KEY (digest, owner)) WITHOUT ROWID;
    CREATE INDEX pins_by_owner ON pins (owner);
    """,
    "CREATE TABLE tokens (id TEXT PRIMARY KEY, record TEXT NOT NULL);",
)


_MAY_PASS = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,  # Also where a side file has no room to grow.
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_NOMEM,
    }
)
_LASTING = frozenset(
    {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}
)
_LEAST_FREE = 2**20
"""Bytes: opening a store writes less."""
_OPENING_MILLISECONDS = 5000
_LOCKED_MILLISECONDS = 100
"""How long another process may keep the file locked until we are behind: workers and people wait meanwhile."""


class Store:
    """The database in `path`.

    Writing raises nothing when the file can't be written: see `behind`.

    Raises `ServiceError` when it can't be opened, or was written by a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # SQLite gives its side files the mode of the database.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            path.chmod(0o600)
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            # WAL with NORMAL survives a crash of the process; only a power cut may lose the last commits.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(f"PRAGMA busy_timeout={_OPENING_MILLISECONDS}")
            self._migrate()
            self._db.execute(f"PRAGMA busy_timeout={_LOCKED_MILLISECONDS}")
            self._numbers = {table: self._last_number(table) for table in ("events", "logs")}
        except (sqlite3.Error, OSError) as error:
            raise ServiceError(f"can't open the coordinator's store {path}: {error}{_advice(error, path)}") from None
        self._unwritten: list[tuple[str, tuple[Any, ...]]] = []
        """The statements since the last transaction that was committed."""
        self.behind: str | None = None
        """Why nothing can be written for now, in words; what is asked for waits. Reads see what has been written."""
        self.broken = False
        """Whether it will never be written by this process: the file is damaged, or not ours to write."""
        self.unreadable: dict[str, str] = {}
        """Job -> why its record can't be read, since `jobs` was asked for."""

    def _migrate(self) -> None:
        self._db.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        row = self._db.execute("SELECT max(version) FROM schema_version").fetchone()
        version = row[0] or 0
        if version > len(MIGRATIONS):
            raise ServiceError(
                f"the store {self.path} has schema version {version}, this Fusion knows {len(MIGRATIONS)}; "
                "update Fusion or use another --state folder"
            )
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            self._db.executescript(f"BEGIN; {script} INSERT INTO schema_version VALUES ({number}); COMMIT;")

    def _last_number(self, table: str) -> int:
        """The highest sequence number that a row of `table` ever had."""
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
        return int(row[0]) if row is not None else 0

    def close(self) -> None:
        """Commit, and close the file; what could not be written is lost."""
        self.commit()
        self._db.close()

    def commit(self) -> None:
        """End the transaction that the first write since the last commit began, unless we are `behind`."""
        if self._unwritten and self.behind is None:
            try:
                self._db.execute("COMMIT")
            except sqlite3.DatabaseError as error:
                self._fall_behind(error)
            else:
                self._unwritten.clear()

    def catch_up(self) -> bool:
        """Try to write what could not be written, in order and as one transaction; returns whether nothing waits any more.

        A statement that was written after all, before an error at the end of its transaction, changes nothing when repeated.
        """
        if self.broken:
            return False
        try:
            self._db.execute("BEGIN")
            for sql, values in self._unwritten:
                self._db.execute(sql, values)
            self._db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            self._fall_behind(error)
            return False
        self._unwritten.clear()
        self.behind = None
        return True

    def _write(self, sql: str, values: tuple[Any, ...]) -> None:
        if self.behind is None:
            try:
                if not self._db.in_transaction:
                    self._db.execute("BEGIN")
                self._db.execute(sql, values)
            except sqlite3.DatabaseError as error:
                if not _is_trouble_of_the_file(error):
                    raise
                self._fall_behind(error)
        self._unwritten.append((sql, values))

    def _fall_behind(self, error: sqlite3.DatabaseError) -> None:
        """Undo the transaction whole, as SQLite itself has done after some errors and not after others."""
        with contextlib.suppress(sqlite3.DatabaseError):
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        self.behind = str(error)
        # What was refused for itself, and not for the state of the file, would be refused for ever.
        self.broken = _code(error) in _LASTING or not _is_trouble_of_the_file(error)

    # Jobs and plans -----------------------------------------------------------------------------------------------

    def save_job(self, job: Job) -> None:
        self._write(
            "INSERT INTO jobs VALUES (?, ?, ?) ON CONFLICT (id) DO UPDATE SET record = excluded.record",
            (job.id, job.number, job.model_dump_json()),
        )

    def jobs(self) -> list[Job]:
        """Those that this version can read; `unreadable` has the others, which stay where they are."""
        found: list[Job] = []
        self.unreadable.clear()
        for job, record in self._db.execute("SELECT id, record FROM jobs ORDER BY number"):
            try:
                found.append(Job.model_validate_json(record))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                self.unreadable[job] = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        return found

    def highest_number(self) -> int:
        """Of all jobs that were ever submitted."""
        (highest,) = self._db.execute("SELECT COALESCE(MAX(number), 0) FROM jobs").fetchone()
        return int(highest)

    def save_plan(self, job: str, plan: Plan) -> None:
        self._write("INSERT OR REPLACE INTO plans VALUES (?, ?, ?)", (job, plan.epoch, plan.model_dump_json()))

    def plans(self, job: str) -> list[Plan]:
        """Every plan the job has had, by epoch."""
        rows = self._db.execute("SELECT plan FROM plans WHERE job = ? ORDER BY epoch", (job,))
        return [Plan.model_validate_json(plan) for (plan,) in rows]

    # Metrics, events, logs ----------------------------------------------------------------------------------------

    def add_metric(self, job: str, metric: Metric) -> dict[str, Any]:
        """Record one step and return it as it is shown; a step that is there already stays as it is."""
        text = metric.model_dump_json(exclude_none=True)
        shown: dict[str, Any] = {"loss": None, **json.loads(text)}
        self._write("INSERT OR IGNORE INTO metrics VALUES (?, ?, ?)", (job, metric.step, json.dumps(shown)))
        return shown

    def metrics(self, job: str, after: int = 0, limit: int = 10_000) -> list[dict[str, Any]]:
        """Metrics of the steps after `after`, in order."""
        rows = self._db.execute(
            "SELECT data FROM metrics WHERE job = ? AND step > ? ORDER BY step LIMIT ?", (job, after, limit)
        )
        return [json.loads(data) for (data,) in rows]

    def add_event(
        self, time: float, job: str | None, event: str, message: str, fields: dict[str, Any]
    ) -> dict[str, Any]:
        return self._append("events", time, job, {**fields, "event": event, "message": message})

    def events(
        self, job: str | None = None, after: int = 0, limit: int = 10_000, *, newest: bool = False
    ) -> list[dict[str, Any]]:
        """Events after sequence number `after`: of one job, or of the whole pool; at most the first or `newest` `limit`."""
        return self._sequence("events", job, after, limit, newest)

    def latest_event(self) -> int:
        row = self._db.execute("SELECT max(seq) FROM events").fetchone()
        return int(row[0] or 0)

    def add_log(self, time: float, job: str | None, worker: str, message: str) -> dict[str, Any]:
        return self._append("logs", time, job, {"worker": worker, "message": message})

    def logs(self, job: str, after: int = 0, limit: int = 10_000, *, newest: bool = False) -> list[dict[str, Any]]:
        return self._sequence("logs", job, after, limit, newest)

    def _append(self, table: str, time: float, job: str | None, data: dict[str, Any]) -> dict[str, Any]:
        number = self._numbers[table] + 1
        self._write(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", (number, time, job, json.dumps(data)))
        self._numbers[table] = number
        return {"seq": number, "time": time, "job": job, **data}

    def _sequence(
        self, table: str, job: str | None, after: int, limit: int, newest: bool = False
    ) -> list[dict[str, Any]]:
        where, values = ("job = ? AND", (job,)) if job is not None else ("", ())
        rows = self._db.execute(
            f"SELECT seq, time, job, data FROM {table} WHERE {where} seq > ? ORDER BY seq {'DESC' if newest else ''} LIMIT ?",
            (*values, after, limit),
        ).fetchall()
        ordered = reversed(rows) if newest else rows
        return [{"seq": seq, "time": time, "job": owner, **json.loads(data)} for seq, time, owner, data in ordered]

    # Checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self, job: str, step: int, data: dict[str, Any]) -> None:
        self._write("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?)", (job, step, json.dumps(data)))

    def delete_checkpoint(self, job: str, step: int) -> None:
        self._write("DELETE FROM checkpoints WHERE job = ? AND step = ?", (job, step))

    def checkpoints(self, job: str) -> list[dict[str, Any]]:
        """The job's checkpoints by step."""
        rows = self._db.execute("SELECT data FROM checkpoints WHERE job = ? ORDER BY step", (job,))
        return [json.loads(data) for (data,) in rows]

    # Workers ------------------------------------------------------------------------------------------------------

    def save_worker(self, member: Member) -> None:
        self._write("INSERT OR REPLACE INTO workers VALUES (?, ?)", (member.name, member.model_dump_json()))

    def workers(self) -> list[Member]:
        """The last incarnation of every worker that was ever seen, in order of joining."""
        rows = self._db.execute("SELECT record FROM workers")
        members = [Member.model_validate_json(record) for (record,) in rows]
        return sorted(members, key=lambda member: member.joined_at)

    # Tokens -------------------------------------------------------------------------------------------------------

    def save_token(self, token: Token) -> None:
        """Write a token's record, which holds its hash, and commit."""
        self._write("INSERT OR REPLACE INTO tokens VALUES (?, ?)", (token.id, token.model_dump_json()))
        self.commit()

    def tokens(self) -> list[Token]:
        rows = self._db.execute("SELECT record FROM tokens")
        return [Token.model_validate_json(record) for (record,) in rows]

    # Pins: who needs a blob ---------------------------------------------------------------------------------------

    def pin(self, owner: str, digests: Iterator[str] | list[str]) -> None:
        for digest in digests:
            self._write("INSERT OR IGNORE INTO pins VALUES (?, ?)", (digest, owner))

    def unpin(self, owner: str) -> list[str]:
        """Drop an owner's pins; return the digests that nobody needs any more."""
        digests = [digest for (digest,) in self._db.execute("SELECT digest FROM pins WHERE owner = ?", (owner,))]
        self._write("DELETE FROM pins WHERE owner = ?", (owner,))
        return [digest for digest in digests if not self.pinned(digest)]

    def pinned(self, digest: str) -> bool:
        return self._db.execute("SELECT 1 FROM pins WHERE digest = ? LIMIT 1", (digest,)).fetchone() is not None


def _code(error: sqlite3.DatabaseError) -> int:
    """SQLite's primary result code."""
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF


def _advice(error: sqlite3.Error | OSError, path: Path) -> str:
    """What to do about a store that can't be opened, where that is known."""
    code = _code(error) if isinstance(error, sqlite3.DatabaseError) else None
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return "; the file is damaged: put a copy of it in its place, or use another --state folder"
    full = code == sqlite3.SQLITE_FULL or (isinstance(error, OSError) and is_disk_full(error))
    if full or (code == sqlite3.SQLITE_IOERR and shutil.disk_usage(path.parent).free < _LEAST_FREE):
        return "; make room on that disk and start it again: nothing that was recorded is lost"
    return ""


def _is_trouble_of_the_file(error: sqlite3.DatabaseError) -> bool:
    return _code(error) in _MAY_PASS | _LASTING
