"""HTTP routes of the dashboard's own files: one page and its scripts and styles, all served from here."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from aiohttp import ETag, web

from coordinator.http import sign_in
from coordinator.http.routing import Answer, HttpError, Parameter, Route
from coordinator.shown.views import ErrorView

_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
PAGE = "index.html"
HEADERS = {
    # Nothing from elsewhere, nothing inline. The frame is the OP-DAG's page, which carries its own policy.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def dashboard(request: web.Request) -> web.Response:
    return sign_in.refusal(request) or _file(request, PAGE)


async def dashboard_file(request: web.Request) -> web.Response:
    name = request.match_info["file"]
    if name not in _files() or name == PAGE:
        raise HttpError(404, f"the dashboard has no file {name[:80]!r}")
    return _file(request, name)


@cache
def _files() -> dict[str, tuple[bytes, str, str]]:
    """Name -> (content, content type, tag) of every file in the folder; they do not change while we run."""
    return {
        path.name: (path.read_bytes(), _TYPES[ending], hashlib.sha256(path.read_bytes()).hexdigest()[:16])
        for path in resources.files("coordinator.http.dashboard").iterdir()
        if (ending := path.name.rpartition(".")[2]) in _TYPES
    }


def _file(request: web.Request, name: str) -> web.Response:
    content, content_type, tag = _files()[name]
    known = request.if_none_match
    if known is not None and any(each.value == tag for each in known):
        answer = web.Response(status=304, headers=HEADERS)
    else:
        answer = web.Response(body=content, content_type=content_type, charset="utf-8", headers=HEADERS)
        answer.enable_compression()
    answer.etag = ETag(tag)
    return answer


ROUTES = (
    Route(
        "GET",
        "/",
        dashboard,
        "The dashboard; `?token=...` is kept as a cookie that opens reads.",
        (
            Answer(200, "The page.", content_type="text/html"),
            Answer(303, "The token is good: ask again without it.", content_type=""),
            Answer(304, "The page that you have is the present one.", content_type=""),
            Answer(401, "A page that asks for a token.", content_type="text/html"),
        ),
        (Parameter("token", "A viewer's or operator's token.", "query"),),
    ),
    Route(
        "GET",
        "/dashboard/{file}",
        dashboard_file,
        "The dashboard's scripts and styles.",
        (
            Answer(200, "The file.", content_type="text/javascript"),
            Answer(304, "The file that you have is the present one.", content_type=""),
            Answer(404, "No such file.", ErrorView),
        ),
        (Parameter("file", "Its name."),),
    ),
)
