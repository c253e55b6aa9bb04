"""Files at URLs of any kind: what fails is one line without the URL's secrets."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from fusion.errors import UserError
from fusion.remote_files import RemoteFolder, fetch, is_url, put, shown


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/runs", True),
        ("file:///tmp/x", True),
        ("simplecache::s3://bucket", True),
        ("runs/12", False),
        ("/tmp/x", False),
        ("job-1@4", False),
        ("model.safetensors", False),
    ],
)
def test_urls_and_paths_are_told_apart(text: str, url: bool) -> None:
    assert is_url(text) is url


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"content")
    for url in ("memory://a/b", (tmp_path / "a" / "b").as_uri()):
        folder = RemoteFolder(url)
        assert not folder.has("1/model")
        folder.put(tmp_path / "here", "1/model")
        assert folder.has("1/model")
        assert folder.get(tmp_path / "back", "1/model")
        assert (tmp_path / "back").read_bytes() == b"content"
        folder.remove("1")
        folder.remove("1")
        assert not folder.get(tmp_path / "back", "1/model")
        put(tmp_path / "here", f"{url}/alone")
        fetch(f"{url}/alone", tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == b"content"


def test_what_can_not_be_done_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^nonsense://x: can't be used: Protocol not known: nonsense"):
        RemoteFolder("nonsense://x")
    with pytest.raises(UserError, match=r"^memory://none: no such file$"):
        fetch("memory://none", tmp_path / "x")

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("the store\nis away")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "put_file", away)
    (tmp_path / "here").write_bytes(b"x")
    with pytest.raises(UserError, match=r"^memory://a: can't write b: the store is away$"):
        RemoteFolder("memory://a").put(tmp_path / "here", "b")


def test_no_secret_of_a_url_is_shown() -> None:
    assert shown("sftp://ada:secret@host:22/runs?key=secret#secret") == "sftp://host:22/runs"
