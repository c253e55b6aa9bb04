"""Content-addressed blobs on disk: a file is named by the SHA-256 of its content, and is whole or not there at all."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import AsyncIterable, Iterator
from pathlib import Path

from fusion.errors import BlobError, ServiceError
from fusion.messages import BlobRef
from fusion.units import format_bytes

_DIGEST = re.compile(r"^[0-9a-f]{64}$")
# EFBIG: a file-size limit (ulimit -f, a quota of the file system) looks to us like a full disk.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DiskFullError(ServiceError):
    """There is no room for a file that we were asked to keep."""


def is_disk_full(error: OSError) -> bool:
    return error.errno in _FULL


def sync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class BlobStore:
    """Blobs under `root`. Sizes in bytes."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._incoming = root / "incoming"
        root.mkdir(parents=True, exist_ok=True)
        self._incoming.mkdir(exist_ok=True)
        for leftover in self._incoming.iterdir():  # From a process that was killed in the middle.
            leftover.unlink()

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be. Raises `BlobError` for something that is not a digest."""
        if not _DIGEST.match(digest):
            raise BlobError(f"{digest[:80]!r} is not a SHA-256 in 64 lower-case hex digits")
        return self.root / digest[:2] / digest

    def size(self, digest: str) -> int | None:
        """The blob's size, or None when it is not here."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def require(self, ref: BlobRef, what: str) -> Path:
        """The path of a blob that must be here with the size that `ref` says. Raises `BlobError`."""
        size = self.size(ref.digest)
        if size is None:
            raise BlobError(f"{what}: blob {ref.digest} is not here; upload it first")
        if size != ref.size:
            raise BlobError(f"{what}: blob {ref.digest} has {size} bytes, not {ref.size}")
        return self.path(ref.digest)

    async def receive(self, digest: str, chunks: AsyncIterable[bytes], announced: int | None) -> tuple[int, bool]:
        """Keep a blob that arrives in pieces; returns its size and whether it is new.

        Raises `BlobError` (wrong hash, too large; nothing is kept) or `DiskFullError`.
        """
        target = self.path(digest)
        if announced is not None and announced > self.max_bytes:
            raise BlobError(f"blob of {announced} bytes is larger than {self.max_bytes}")
        hasher = hashlib.sha256()
        received = 0
        file, name = tempfile.mkstemp(dir=self._incoming)
        temporary = Path(name)
        try:
            with os.fdopen(file, "wb") as handle:
                async for chunk in chunks:
                    received += len(chunk)
                    if received > self.max_bytes:
                        raise BlobError(f"blob is larger than {self.max_bytes} bytes")
                    hasher.update(chunk)
                    handle.write(chunk)
                if hasher.hexdigest() != digest:
                    raise BlobError(f"content of {received} bytes has SHA-256 {hasher.hexdigest()}, not {digest}")
                if target.exists():
                    target.touch()
                    return received, False
                handle.flush()
                await asyncio.to_thread(os.fsync, handle.fileno())
            self._keep(temporary, target)
            return received, True
        except OSError as error:
            if is_disk_full(error):
                raise DiskFullError(
                    f"no room for a blob of {format_bytes(announced or received)} in {self.root}: {error.strerror}"
                ) from None
            raise
        finally:
            temporary.unlink(missing_ok=True)  # noqa: ASYNC240 - one quick call

    def adopt(self, file: Path, digest: str) -> None:
        """Make a file that we wrote (and hashed) ourselves a blob too, without copying it."""
        target = self.path(digest)
        with contextlib.suppress(FileNotFoundError):
            os.utime(target)  # It is here, and needed from now on, whoever may have dropped it before.
            return
        # Another thread may be about to make the same one.
        link = self._incoming / f"{digest}-{secrets.token_hex(8)}"
        os.link(file, link)
        try:
            self._keep(link, target)
        finally:
            link.unlink(missing_ok=True)

    def temporary(self) -> Path:
        """A fresh empty file on the same file system, to be written and given to `adopt`; the caller removes it."""
        file, name = tempfile.mkstemp(dir=self._incoming)
        os.close(file)
        return Path(name)

    def all(self) -> Iterator[tuple[str, float]]:
        """Every blob's digest and when it was last touched (seconds since the epoch)."""
        for path in self.root.glob("??/*"):
            if _DIGEST.match(path.name):
                yield path.name, path.stat().st_mtime

    def touched_since(self, digest: str, moment: float) -> bool:
        """Whether the blob was uploaded, or asked after by somebody who would have uploaded it, since `moment`."""
        try:
            # A file system's clock lags behind by some milliseconds.
            return self.path(digest).stat().st_mtime > moment - 0.01
        except FileNotFoundError:
            return False

    def touch(self, digest: str) -> None:
        """Somebody relies on the blob being here."""
        self.path(digest).touch()

    def delete(self, digest: str) -> None:
        self.path(digest).unlink(missing_ok=True)

    def _keep(self, temporary: Path, target: Path) -> None:
        target.parent.mkdir(exist_ok=True)
        temporary.rename(target)
        sync_directory(target.parent)
