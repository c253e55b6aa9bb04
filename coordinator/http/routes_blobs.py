"""HTTP routes of content-addressed blobs."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from coordinator.http.routing import ENGINE, Answer, HttpError, Parameter, Route
from coordinator.shown.views import ErrorView
from coordinator.storage.blobs import DiskFullError
from fusion.errors import BlobError
from fusion.messages import BlobRef

PIECE = 256 * 1024


async def get_blob(request: web.Request) -> web.StreamResponse:
    """Also serves HEAD; `Range` is understood."""
    blobs = request.app[ENGINE].blobs
    digest = request.match_info["digest"]
    try:
        size = blobs.size(digest)
    except BlobError as error:
        raise HttpError(400, str(error)) from None
    if size is None:
        raise HttpError(404, f"no blob {digest}")
    if request.method == "HEAD":
        blobs.touch(digest)
    return file_response(request, blobs.path(digest), digest)


def file_response(request: web.Request, path: Path, digest: str) -> web.FileResponse:
    """The file, or the range of it that is asked for. Raises `HttpError` 416."""
    _check_range(request, path)
    return web.FileResponse(
        str(path),
        chunk_size=PIECE,
        headers={"Content-Type": "application/octet-stream", "Cache-Control": "immutable", "X-Fusion-Digest": digest},
    )


def _check_range(request: web.Request, path: Path) -> None:
    """By the rules of aiohttp, whose own refusal has no body."""
    try:
        found = path.stat()
    except OSError:
        return  # It was removed a moment ago: 404.
    if request.if_range is not None and found.st_mtime > request.if_range.timestamp():
        return
    try:
        start = request.http_range.start
    except ValueError:
        start = found.st_size
    if start is not None and start >= found.st_size:
        asked = request.headers.get("Range", "")[:80]
        message = f"Range {asked!r} is not in the {found.st_size} bytes that are here"
        raise HttpError(416, message, {"Content-Range": f"bytes */{found.st_size}"})


async def put_blob(request: web.Request) -> web.Response:
    blobs = request.app[ENGINE].blobs
    digest = request.match_info["digest"]
    try:
        size, new = await blobs.receive(digest, request.content.iter_chunked(PIECE), request.content_length)
    except BlobError as error:
        too_large = "larger than" in str(error)
        # The rest of the body was not read: the connection can't be used again.
        raise HttpError(413 if too_large else 400, str(error), {"Connection": "close"}) from None
    except DiskFullError as error:
        raise HttpError(507, str(error), {"Connection": "close"}) from None
    ref = BlobRef(digest=digest, size=size)
    return web.json_response(ref.model_dump(mode="json"), status=201 if new else 200)


_DIGEST = Parameter("digest", "SHA-256 of the content.", schema={"type": "string", "pattern": "^[0-9a-f]{64}$"})
_RANGE = Parameter("Range", "`bytes=FIRST-LAST`", "header")
_MISSING = Answer(404, "Not here.", ErrorView)
_BAD = Answer(400, "Not a digest, or not the digest of the content; nothing is kept.", ErrorView)

ROUTES = (
    Route(
        "GET",
        "/api/v1/blobs/{digest}",
        get_blob,
        "A blob, or a range of it.",
        (
            Answer(200, "All of it.", content_type="application/octet-stream"),
            Answer(206, "The range.", content_type="application/octet-stream"),
            Answer(416, "The range is not in the blob.", ErrorView),
            _BAD,
            _MISSING,
        ),
        (_DIGEST, _RANGE),
        right="member",
    ),
    Route(
        "HEAD",
        "/api/v1/blobs/{digest}",
        get_blob,
        "Whether a blob is here.",
        (
            Answer(200, "It is.", content_type=""),
            Answer(206, "It is.", content_type=""),
            Answer(416, "The range is not in the blob.", content_type=""),
            Answer(400, "Not a digest.", content_type=""),
            Answer(404, "It is not.", content_type=""),
        ),
        (_DIGEST,),
        right="member",
    ),
    Route(
        "PUT",
        "/api/v1/blobs/{digest}",
        put_blob,
        "Keep a blob. The content must have this digest.",
        (
            Answer(201, "Kept.", BlobRef),
            Answer(200, "It was here already.", BlobRef),
            _BAD,
            Answer(413, "Too large.", ErrorView),
            Answer(507, "The disk is full.", ErrorView),
        ),
        (_DIGEST,),
        body_content_type="application/octet-stream",
        right="member",
    ),
)
