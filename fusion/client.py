"""HTTP client of a coordinator: the routes of `/api/v1` as methods, each failure as one clear error."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import quote

from fusion.addresses import split_url
from fusion.credentials import check_token
from fusion.errors import BlobError, CoordinatorError, UnreachableError, UserError, VersionError
from fusion.event_stream import StreamItem, server_sent_events
from fusion.file_reader import FileReader
from fusion.logs import redact
from fusion.tls import client_context, explain

if TYPE_CHECKING:
    from fusion.messages import BlobRef  # pydantic's models take longer to import than a short command runs

__all__ = ["Client", "Json", "StreamItem"]
Json = dict[str, Any]
MAX_ANSWER_BYTES = 256 * 2**20
_CHUNK = 1 << 20
_PAGE = 10_000
"""Coordinators give so many items of a list at once."""
_LAST_BYTES_SECONDS = 300.0


class Client:
    """Talks to one coordinator. Keeps one connection alive; not for use from several threads at once.

    Raises `UnreachableError` when nobody answers, `CoordinatorError` (with `.status`) when the answer is an error.
    """

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 30.0, ca: str | Path | None = None
    ) -> None:
        """`ca`: certificates to trust instead of the machine's authorities (or `FUSION_TLS_CA`), for https."""
        parts = split_url(url)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{redact(url)!r} is not a coordinator's address; it looks like http://HOST:PORT")
        check_token(token)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.token = token
        self.timeout = timeout
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        try:
            self._port = parts.port or (443 if self._tls else 80)
        except ValueError:
            raise UserError(f"{redact(url)!r}: the port is not a number between 1 and 65535") from None
        self._context = client_context(ca) if self._tls else None
        self._kept: http.client.HTTPConnection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def submit_raw(self, body: Mapping[str, Any]) -> Json:
        """`POST /api/v1/jobs` with spec, dag, weights, data and resume already made; returns the job."""
        return self._object("POST", "/api/v1/jobs", dict(body))

    def jobs(self) -> list[Json]:
        return self._list("/api/v1/jobs", "jobs")

    def job(self, job: str) -> Json:
        return self._object("GET", f"/api/v1/jobs/{quote(job, safe='')}")

    def cancel(self, job: str) -> Json:
        return self._object("POST", f"/api/v1/jobs/{quote(job, safe='')}/cancel", {})

    def metrics(self, job: str, after: int = 0) -> list[Json]:
        """One entry per step after `after`, ascending."""
        return self._pages(f"/api/v1/jobs/{quote(job, safe='')}/metrics", "metrics", "step", after)

    def events(self, job: str, after: int = 0) -> list[Json]:
        return self._pages(f"/api/v1/jobs/{quote(job, safe='')}/events", "events", "seq", after)

    def timeline(self, job: str) -> Json:
        """Tasks and transfers of the last steps that were traced."""
        return self._object("GET", f"/api/v1/jobs/{quote(job, safe='')}/timeline")

    def logs(self, job: str, after: int = 0) -> list[Json]:
        return self._pages(f"/api/v1/jobs/{quote(job, safe='')}/logs", "logs", "seq", after)

    def stream(
        self,
        job: str | None = None,
        *,
        after_step: int = 0,
        after_event: int = 0,
        after_log: int = 0,
        idle_seconds: float = 60.0,
    ) -> Generator[StreamItem, None, None]:
        """Items of one job, recorded and live, until it has ended; or of the pool, live. `after_...` leave out old ones.

        Raises `UnreachableError` when the connection breaks or stays silent for `idle_seconds`.
        """
        path = "/api/v1/stream"
        if job is not None:
            path = f"/api/v1/jobs/{quote(job, safe='')}/stream"
            path += f"?after_step={after_step}&after_event={after_event}&after_log={after_log}"
        connection = self._connection(idle_seconds)
        try:
            response = self._send(connection, "GET", path, None, {"Accept": "text/event-stream"})
            if response.status != 200:
                self._raise(response.status, response.read(_CHUNK))
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._unreachable(error) from None
        except BaseException:
            connection.close()
            raise
        return self._items(connection, response)

    def _items(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> Generator[StreamItem, None, None]:
        try:
            yield from server_sent_events(response)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None
        finally:
            response.close()
            connection.close()

    # -- workers ------------------------------------------------------------------------------------------------------

    def workers(self) -> list[Json]:
        return self._list("/api/v1/workers", "workers")

    def links(self) -> list[Json]:
        """What is known of the links between workers."""
        return self._list("/api/v1/links", "links")

    def drain(self, worker: str) -> Json:
        return self._object("POST", f"/api/v1/workers/{quote(worker, safe='')}/drain", {})

    # -- tokens -------------------------------------------------------------------------------------------------------

    def tokens(self) -> list[Json]:
        """The tokens that were made, without their secrets."""
        return self._list("/api/v1/tokens", "tokens")

    def create_token(self, role: str, lifetime_seconds: float | None, uses: int | None = None, note: str = "") -> Json:
        """Make a token; `token` in the answer is shown this once."""
        fields = {"role": role, "lifetime_seconds": lifetime_seconds, "uses": uses, "note": note}
        return self._object("POST", "/api/v1/tokens", fields)

    def revoke_token(self, token_id: str) -> Json:
        return self._object("POST", f"/api/v1/tokens/{quote(token_id, safe='')}/revoke", {})

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self, job: str) -> list[Json]:
        """The job's checkpoints, ascending by step."""
        return self._list(f"/api/v1/jobs/{quote(job, safe='')}/checkpoints", "checkpoints")

    def download_checkpoint(
        self, job: str, step: int, part: str, target: Path, progress: Callable[[int, int], None] | None = None
    ) -> Path:
        """Fetch `model` or `optimizer` of a checkpoint into `target`, whole or not at all."""
        path = f"/api/v1/jobs/{quote(job, safe='')}/checkpoints/{step}/{part}.safetensors"
        fresh = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            with self._streamed("GET", path) as response, _writing(target), open(fresh, "wb") as file:
                expected = int(response.headers.get("Content-Length") or -1)
                received = 0
                while chunk := self._read(response):
                    file.write(chunk)
                    received += len(chunk)
                    if progress is not None:
                        progress(received, expected)
            if expected >= 0 and received != expected:
                raise UnreachableError(f"{self.url}: the download broke off after {received} of {expected} bytes")
            with _writing(target):
                os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)
        return target

    def dag(self, job: str) -> bytes:
        """The job's OP-DAG, as `dag.serialize.loads` reads it."""
        return self._request("GET", f"/api/v1/jobs/{quote(job, safe='')}/dag")

    # -- blobs --------------------------------------------------------------------------------------------------------

    def has_blob(self, digest: str) -> bool:
        try:
            self._request("HEAD", f"/api/v1/blobs/{digest}")
        except CoordinatorError as error:
            if error.status == 404:
                return False
            raise
        return True

    def upload_blob(self, ref: BlobRef, source: bytes | Path, progress: Callable[[int], None] | None = None) -> bool:
        """Put a content-addressed blob there, unless it is there already. Returns whether bytes travelled."""
        if self.has_blob(ref.digest):
            if progress is not None:
                progress(ref.size)
            return False
        with BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            self._request("PUT", f"/api/v1/blobs/{ref.digest}", FileReader(file, progress), _blob_headers(ref))
        return True

    def download_blob(self, ref: BlobRef) -> bytes:
        data = self._request("GET", f"/api/v1/blobs/{ref.digest}")
        if len(data) != ref.size:
            raise BlobError(f"blob {ref.digest[:12]} has {len(data)} bytes, expected {ref.size}")
        return data

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def _object(self, method: str, path: str, body: Json | None = None) -> Json:
        answer = self._json(method, path, body)
        if not isinstance(answer, dict):
            raise CoordinatorError(f"{self.url}{path}: expected an object, got {type(answer).__name__}")
        return answer

    def _list(self, path: str, key: str) -> list[Json]:
        """A list, given as such or under `key`."""
        answer = self._json("GET", path)
        if isinstance(answer, dict):
            answer = answer.get(key)
        if not isinstance(answer, list):
            raise CoordinatorError(f"{self.url}{path}: expected a list of {key}")
        return answer

    def _pages(self, path: str, key: str, number: str, after: int) -> list[Json]:
        """All of a list whose items are numbered, from after this number on."""
        found: list[Json] = []
        while True:
            page = self._list(f"{path}?after={after}", key)
            found += page
            if len(page) < _PAGE:
                return found
            after = int(page[-1][number])

    def _json(self, method: str, path: str, body: Json | None = None) -> Any:
        headers = {"Accept": "application/json"}
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        raw = self._request(method, path, data, headers)
        try:
            return json.loads(raw) if raw else {}
        except ValueError:
            raise CoordinatorError(f"{self.url}{path}: the answer is not JSON; is this a Fusion coordinator?") from None

    def _request(
        self, method: str, path: str, body: bytes | FileReader | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        with self._streamed(method, path, body, headers) as response:
            data = response.read(MAX_ANSWER_BYTES + 1)
        if len(data) > MAX_ANSWER_BYTES:
            self.close()
            raise CoordinatorError(f"{self.url}{path}: the answer is larger than {MAX_ANSWER_BYTES} bytes")
        return data

    @contextmanager
    def _streamed(
        self, method: str, path: str, body: bytes | FileReader | None = None, headers: Mapping[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """A response with a good status; the kept connection is dropped when anything goes wrong."""
        reused = self._kept is not None
        connection = self._kept or self._connection(self.timeout)
        self._kept = connection
        try:
            try:
                response = self._send(connection, method, path, body, headers or {})
            except (http.client.RemoteDisconnected, ConnectionError, http.client.CannotSendRequest):
                if not reused:
                    raise
                # The server closed an idle connection: that is no failure, ask once more on a fresh one.
                self.close()
                if isinstance(body, FileReader):
                    body.rewind()
                self._kept = connection = self._connection(self.timeout)
                response = self._send(connection, method, path, body, headers or {})
            if response.status >= 400:
                self._raise(response.status, response.read(_CHUNK))
            yield response
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._unreachable(error) from None
        except BaseException:
            self.close()
            raise

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from None

    def _connection(self, timeout: float) -> http.client.HTTPConnection:
        if self._tls:
            return http.client.HTTPSConnection(self._host, self._port, timeout=timeout, context=self._context)
        return http.client.HTTPConnection(self._host, self._port, timeout=timeout)

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | FileReader | None,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        sent = dict(headers)
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        connection.request(method, path, body, sent)
        if isinstance(body, FileReader) and connection.sock is not None:
            # The last of it is still in the kernel's buffers, and may be for long on a slow link.
            connection.sock.settimeout(max(self.timeout, _LAST_BYTES_SECONDS))
        return connection.getresponse()

    def _unreachable(self, error: BaseException) -> UnreachableError:
        if isinstance(error, ConnectionRefusedError):
            reason = "nobody listens there; is the coordinator running?"
        elif isinstance(error, socket.gaierror):
            reason = f"can't find the host {self._host!r}"
        elif isinstance(error, TimeoutError):
            reason = "no answer in time"
        elif isinstance(error, ssl.SSLError):
            reason = explain(error, self._host)
        elif isinstance(error, http.client.RemoteDisconnected) and not self._tls:
            reason = "it closed the connection; if it was started with --tls-cert, use https:// instead of http://"
        else:
            reason = str(error) or type(error).__name__
        return UnreachableError(f"can't reach the coordinator at {self.url}: {reason}")

    def _raise(self, status: int, raw: bytes) -> None:
        try:
            message = str(json.loads(raw)["error"])
        except (ValueError, KeyError, TypeError):
            message = raw.decode("utf-8", "replace").strip().splitlines()[0][:200] if raw.strip() else ""
        if status in (401, 403):
            # What answers HEAD has no room for the reason.
            advice = "its token is missing or wrong; give --token (or set FUSION_TOKEN)"
            if status == 403:
                advice = "this token does not allow it; take the operator's, or `fusion token create --role operator`"
            raise CoordinatorError(f"the coordinator at {self.url} refused: {message or advice}", status)
        if status == 426:
            raise VersionError(message or "the coordinator speaks another protocol version")
        raise CoordinatorError(message or f"the coordinator at {self.url} answered with status {status}", status)


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{target}: can't write the checkpoint: {error.strerror or error}") from None


def _blob_headers(ref: BlobRef) -> dict[str, str]:
    return {"Content-Type": "application/octet-stream", "Content-Length": str(ref.size)}
