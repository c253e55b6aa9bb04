"""Tokens that people make: each has a role, ends by time, by use or by hand, and is known by its hash only. Sans-I/O.

A token reads `ID.SECRET`. The id is public: it finds the record. The secret has 192 random bits, so that a plain SHA-256 of
the text can't be turned back, and it is compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["viewer", "operator", "join"]
"""`viewer`: read. `operator`: everything. `join`: what a worker needs, which is to join, and to read and write blobs."""
Right = Literal["viewer", "join", "member", "operator"]
"""What a route asks for. `member`: the blobs, for those who have joined and for operators."""
TokenState = Literal["valid", "expired", "used up", "revoked"]
Denial = Literal["missing", "unknown", "expired", "used up", "revoked", "role"]

RIGHTS: dict[Role, frozenset[Right]] = {
    "viewer": frozenset({"viewer"}),
    "operator": frozenset({"viewer", "join", "member", "operator"}),
    "join": frozenset({"join", "member"}),
}
MAX_LIFETIME_SECONDS = 10 * 365 * 86400.0
_REMEMBERED = 512
"""A join token that is used more often forgets the first of those that joined and have gone."""


class TokenRequest(BaseModel):
    """Body of `POST /api/v1/tokens`."""

    model_config = ConfigDict(extra="forbid")

    role: Role
    lifetime_seconds: float | None = Field(
        None, gt=0, le=MAX_LIFETIME_SECONDS, description="From now; null: until it is revoked."
    )
    uses: int | None = Field(
        None, ge=1, le=10**9, description="How many workers may join by it, or how many requests it answers for."
    )
    note: str = Field("", max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$", description="What it is for.")


class Token(BaseModel):
    """A token as it is stored. Times are seconds since the epoch."""

    id: str
    role: Role
    digest: str
    note: str = ""
    created_at: float
    expires_at: float | None = None
    uses: int | None = None
    used: int = 0
    revoked_at: float | None = None
    members: list[str] = Field(default_factory=list)
    """Public keys of the workers that joined by it: they stay when it ends, unless it is revoked."""

    def state(self, now: float) -> TokenState:
        if self.revoked_at is not None:
            return "revoked"
        if self.expires_at is not None and now >= self.expires_at:
            return "expired"
        if self.uses is not None and self.used >= self.uses:
            return "used up"
        return "valid"


class TokenView(BaseModel):
    """A token as people see it; the secret is shown once, when it is made."""

    id: str
    role: Role
    state: TokenState
    note: str
    created_at: float
    expires_at: float | None
    uses: int | None
    used: int
    revoked_at: float | None


class DeniedError(Exception):
    """A request that its token does not allow; `kind` is for the metrics."""

    def __init__(self, kind: Denial, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class TokenBook:
    """All tokens that were made, by id. `save` is called with a record before anybody hears of the change."""

    def __init__(self, tokens: Iterable[Token], save: Callable[[Token], None]) -> None:
        self._tokens = {token.id: token for token in tokens}
        self._save = save

    def __iter__(self) -> Iterator[Token]:
        return iter(sorted(self._tokens.values(), key=lambda token: token.created_at))

    def get(self, token_id: str) -> Token | None:
        return self._tokens.get(token_id)

    def make(self, asked: TokenRequest, now: float) -> tuple[Token, str]:
        """A new token's record and its text, which is nowhere but in this answer."""
        token_id = secrets.token_hex(4)
        while token_id in self._tokens:
            token_id = secrets.token_hex(4)
        text = f"{token_id}.{secrets.token_urlsafe(24)}"
        expires = now + asked.lifetime_seconds if asked.lifetime_seconds is not None else None
        token = Token(
            id=token_id,
            role=asked.role,
            digest=_digest(text),
            note=asked.note,
            created_at=now,
            expires_at=expires,
            uses=asked.uses,
        )
        self._tokens[token_id] = token
        self._save(token)
        return token, text

    def revoke(self, token: Token, now: float) -> None:
        """End it for good; a token that was revoked before keeps its time."""
        if token.revoked_at is None:
            token.revoked_at = now
            self._save(token)

    def find(self, text: str) -> Token | None:
        """The record of this text; takes the same time whatever the secret."""
        token = self._tokens.get(text.partition(".")[0])
        known = token.digest if token is not None else _digest("")
        same = hmac.compare_digest(_digest(text), known)
        return token if token is not None and same else None

    def use(self, token: Token, now: float) -> None:
        """Count a request that a viewer's or operator's token answered for. Raises `DeniedError` when it has ended."""
        refuse_ended(token, now)
        if token.uses is not None:
            token.used += 1
            self._save(token)

    def seat(self, token: Token, public_key: str, live: frozenset[str]) -> None:
        """Count a worker that joined; one that joins again with its key is the same worker."""
        if public_key in token.members:
            return
        token.used += 1
        token.members.append(public_key)
        if len(token.members) > _REMEMBERED:
            gone = [key for key in token.members if key not in live]
            forgotten = set(gone[: len(token.members) - _REMEMBERED])
            token.members = [key for key in token.members if key not in forgotten]
        self._save(token)


def refuse_ended(token: Token, now: float) -> None:
    """Raise `DeniedError`, in one line that says what to do, unless the token is valid."""
    state = token.state(now)
    if state == "valid":
        return
    if state == "revoked":
        assert token.revoked_at is not None
        raise DeniedError(state, f"token {token.id} was revoked on {_moment(token.revoked_at)}; {_another(token)}")
    if state == "expired":
        assert token.expires_at is not None
        raise DeniedError(state, f"token {token.id} expired on {_moment(token.expires_at)}; {_another(token)}")
    raise DeniedError(state, f"token {token.id} is used up ({token.used} of {token.uses} uses); {_another(token)}")


def token_view(token: Token, now: float) -> TokenView:
    shown = token.model_dump(exclude={"digest", "members"})
    return TokenView(**shown, state=token.state(now))


def _another(token: Token) -> str:
    return f"ask the pool's operator for another: `fusion token create --role {token.role}`"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
