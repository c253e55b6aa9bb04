"""Files at any URL that fsspec knows: s3://, gs://, sftp://, file:// and the like. Credentials are the store's own affair.

Everything here blocks, and says what fails as a `UserError` in one line that shows no secret of the URL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fusion.errors import UserError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")


def is_url(text: str) -> bool:
    """Whether this is a URL, rather than a path of this machine."""
    return _SCHEME.match(text) is not None


def shown(url: str) -> str:
    """The URL as it may be printed: without user, password and query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


class RemoteFolder:
    """A folder at a URL. Raises `UserError` where fsspec does not know such URLs, or lacks what it takes."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._shown = shown(url)
        with self._in_words("can't be used"):
            self._store, self._root = fsspec.core.url_to_fs(url)

    def __str__(self) -> str:
        return self._shown

    def put(self, local: Path, name: str = "") -> None:
        """Write a copy of a file; `name` may have folders in it, and without one the URL is that of the file."""
        with self._in_words(f"can't write {name}"):
            target = self._path(name)
            self._store.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._store.put_file(str(local), target)

    def get(self, local: Path, name: str = "") -> bool:
        """Fetch a file; False when it is not there."""
        with self._in_words(f"can't read {name}"):
            try:
                self._store.get_file(self._path(name), str(local))
            except FileNotFoundError:
                return False
        return True

    def has(self, name: str) -> bool:
        with self._in_words(f"can't look for {name}"):
            return bool(self._store.exists(self._path(name)))

    def remove(self, name: str) -> None:
        """Delete a folder with all that is in it; it need not be there."""
        with self._in_words(f"can't remove {name}"):
            if self._store.exists(self._path(name)):
                self._store.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{str(self._root).rstrip('/')}/{name}" if name else str(self._root)

    @contextmanager
    def _in_words(self, what: str) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            # Each store raises what its own library does.
            raise UserError(f"{self._shown}: {what.strip()}: {_reason(error)}") from None


def put(local: Path, url: str) -> None:
    """Write a copy of a file to this URL."""
    RemoteFolder(url).put(local)


def fetch(url: str, local: Path) -> None:
    """Fetch the file at this URL."""
    if not RemoteFolder(url).get(local):
        raise UserError(f"{shown(url)}: no such file")


def _reason(error: Any) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:300]
