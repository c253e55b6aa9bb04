"""Lets a person's browser in: a token in the page's address becomes a cookie that opens reads, and leaves the address."""

from __future__ import annotations

from html import escape

from aiohttp import web

from coordinator.entry.tokens import DeniedError
from coordinator.http.guard import COOKIE
from coordinator.http.routing import GUARD

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Fusion</title></head>
<body style="font: 16px system-ui; max-width: 40rem; margin: 4rem auto; padding: 0 1rem; color-scheme: light dark">
<h1 style="font-size: 1.4rem">Fusion</h1>
<p role="alert">{reason}</p>
<form><label>Token <input name="token" type="password" autocomplete="off" required autofocus></label> <button>Look</button></form>
<p>An operator makes one with <code>fusion token create --role viewer</code>.</p>
</body></html>
"""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


def refusal(request: web.Request) -> web.Response | None:
    """The page that asks for a token, the redirect that follows a good one, or None when the dashboard may be shown."""
    guard = request.app[GUARD]
    given = request.query.get("token")
    try:
        if given is None:
            guard.admit(request, "viewer")
            return None
        cookie = guard.cookie_for(given.strip())
    except DeniedError as denial:
        reason = (
            "This dashboard needs a token."
            if denial.kind == "missing"
            else f"{str(denial)[:1].upper()}{str(denial)[1:]}."
        )
        return web.Response(
            text=_PAGE.format(reason=escape(reason)), status=401, content_type="text/html", headers=_HEADERS
        )
    answer = web.Response(status=303, headers={**_HEADERS, "Location": "/"})
    answer.set_cookie(COOKIE, cookie, httponly=True, samesite="Strict", secure=request.secure, path="/")
    return answer
