"""Decides for each HTTP request whether its bearer token gives what the route asks for, and counts those it turns away."""

from __future__ import annotations

import hmac
import ipaddress
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web

from coordinator.engine import Engine
from coordinator.entry.access import Access
from coordinator.entry.tokens import RIGHTS, DeniedError, Right, Role, Token, TokenBook, refuse_ended
from fusion.addresses import is_loopback

COOKIE = "fusion_viewer"
"""Carries a viewer's token for browsers, which can't set headers on an event stream; it opens reads only."""


class Guard:
    """The tokens of the state folder's files and those that people made.

    While the coordinator listens on loopback only, reads are open to the machine's own programs, unless
    `config.require_token` is set.
    """

    def __init__(self, access: Access, engine: Engine) -> None:
        self.book = TokenBook(engine.store.tokens(), engine.store.save_token)
        self.denied: Counter[str] = Counter()
        self._access = access
        self._engine = engine
        self._open_reads = is_loopback(engine.config.host) and not engine.config.require_token

    def admit(self, request: web.Request, right: Right) -> None:
        """Return if the request may pass. Raises `DeniedError`."""
        text = bearer(request)
        if text is None and right == "viewer":
            if self._open_reads and _named_locally(request):
                return
            text = request.cookies.get(COOKIE)
        with self._counted():
            if not text:
                raise DeniedError(
                    "missing",
                    f"{request.method} {request.path[:200]} needs a bearer token; give --token (or set FUSION_TOKEN): "
                    "the coordinator says at its start where it is",
                )
            self._check(text, right)

    def _check(self, text: str, right: Right) -> Role:
        """The role of a token that gives `right`. Raises `DeniedError`."""
        role, token = self._recognise(text)
        if right not in RIGHTS[role]:
            raise DeniedError("role", _wrong_role(role, token))
        if token is not None:
            if token.role != "join":
                self.book.use(token, self._engine.clock())
            elif token.revoked_at is not None or not (right == "join" or self._has_member(token)):
                # A worker that has joined may go on after the end of its invitation; whether it may join, `invite` decides.
                refuse_ended(token, self._engine.clock())
        return role

    def invite(self, request: web.Request, public_key: str) -> None:
        """Whether a worker with this key may join by the request's token. Raises `DeniedError`."""
        token = self._recognise(bearer(request) or "")[1]
        if token is not None and token.role == "join" and public_key not in token.members:
            with self._counted():
                refuse_ended(token, self._engine.clock())

    def seated(self, request: web.Request, public_key: str) -> None:
        """The invited worker has joined."""
        token = self._recognise(bearer(request) or "")[1]
        if token is not None and token.role == "join":
            self.book.seat(token, public_key, self._live_keys())

    def cookie_for(self, text: str) -> str:
        """What the browser of somebody with this token keeps: a token that opens reads and nothing else.

        Raises `DeniedError`.
        """
        with self._counted():
            role = self._check(text, "viewer")
        return text if role == "viewer" else self._access.viewer_token

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except DeniedError as denial:
            self.denied[denial.kind] += 1
            raise

    def _recognise(self, text: str) -> tuple[Role, Token | None]:
        """Compares with every token of the files, so that the time tells nothing."""
        found: Role | None = None
        files: tuple[tuple[Role, str], ...] = (
            ("operator", self._access.operator_token),
            ("join", self._access.join_token),
            ("viewer", self._access.viewer_token),
        )
        for role, known in files:
            if hmac.compare_digest(text.encode("utf-8", "surrogatepass"), known.encode()):
                found = found or role
        token = self.book.find(text)
        if found is not None:
            return found, None
        if token is not None:
            return token.role, token
        raise DeniedError(
            "unknown",
            "the bearer token is wrong; give --token (or set FUSION_TOKEN): the coordinator says at its start where it is",
        )

    def _has_member(self, token: Token) -> bool:
        return not self._live_keys().isdisjoint(token.members)

    def _live_keys(self) -> frozenset[str]:
        return frozenset(member.public_key for member in self._engine.lifecycle.pool.live())


def bearer(request: web.Request) -> str | None:
    """The token of the Authorization header; None without a bearer token."""
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" and text.strip() else None


def _named_locally(request: web.Request) -> bool:
    """Whether the request calls this machine by a name of its own.

    A web page whose host name was bent to 127.0.0.1 (DNS rebinding) sends its own name, and reads nothing.
    """
    try:
        host = request.url.host or ""
    except ValueError:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _wrong_role(role: Role, token: Token | None) -> str:
    if role == "join":
        which = f"token {token.id} is a join token" if token else "this is the join token"
        return (
            f"{which}: workers join with it; other requests need the operator's token or one of `fusion token create`"
        )
    which = f"token {token.id} is a viewer's" if token else "this is the viewer's token"
    return f"{which}: it reads and changes nothing; this needs the operator's token or `fusion token create --role operator`"
