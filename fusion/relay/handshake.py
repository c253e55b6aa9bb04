"""How a connection shows the relay that it holds a ticket: a challenge, and an answer that is good for this connection only.

::

    relay -> worker   FUSRELY1, nonce (32)
    worker -> relay   ticket (16), role (1: C calls, A answers), HMAC-SHA256 of secret over FUSRELY1, nonce, ticket and role (32)
    relay -> worker   +                     once the other end is there; from then on its bytes

The secret itself never crosses this connection, and an answer that was overheard opens nothing.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from typing import Literal

Role = Literal["call", "answer"]

MAGIC = b"FUSRELY1"
NONCE_BYTES = 32
TICKET_BYTES = 16
SECRET_BYTES = 32
ANSWER_BYTES = TICKET_BYTES + 1 + 32
JOINED = b"+"

_LETTERS: dict[Role, bytes] = {"call": b"C", "answer": b"A"}
_ROLES: dict[bytes, Role] = {letter: role for role, letter in _LETTERS.items()}


class RefusedError(ConnectionError):
    """The relay closed the connection, or what answered is no relay."""


def challenge() -> bytes:
    """The relay's first word: different for every connection."""
    return MAGIC + secrets.token_bytes(NONCE_BYTES)


def answer(challenged: bytes, ticket: bytes, secret: bytes, role: Role) -> bytes:
    letter = _LETTERS[role]
    return ticket + letter + hmac.digest(secret, challenged + ticket + letter, "sha256")


def shown(challenged: bytes, answered: bytes, secrets_by_ticket: dict[bytes, bytes]) -> tuple[bytes, Role] | None:
    """The ticket and the role that this answer proves; None when it proves nothing."""
    ticket, letter = answered[:TICKET_BYTES], answered[TICKET_BYTES : TICKET_BYTES + 1]
    secret, role = secrets_by_ticket.get(ticket), _ROLES.get(letter)
    # Unknown tickets cost the same work as wrong proofs: the time tells nothing.
    expected = hmac.digest(secret or bytes(SECRET_BYTES), challenged + ticket + letter, "sha256")
    right = hmac.compare_digest(expected, answered[TICKET_BYTES + 1 :])
    return (ticket, role) if right and secret is not None and role is not None else None


async def enter(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, ticket: bytes, secret: bytes, role: Role
) -> None:
    """Show the ticket over a connection to a relay; returns when the other end is there. Raises `RefusedError`."""
    try:
        challenged = await reader.readexactly(len(MAGIC) + NONCE_BYTES)
        if not challenged.startswith(MAGIC):
            raise RefusedError("what answers there is no relay")
        writer.write(answer(challenged, ticket, secret, role))
        if await reader.readexactly(1) != JOINED:
            raise RefusedError("what answers there is no relay")
    except asyncio.IncompleteReadError:
        raise RefusedError("the relay closed the connection") from None
