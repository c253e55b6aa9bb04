"""Joins the pool over HTTP: keeps trying while nobody answers, ends with one clear line when the answer is no."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from time import time
from urllib.parse import urlsplit

import aiohttp
from pydantic import ValidationError

from fusion.errors import AskAgainError, CoordinatorError, UnreachableError, VersionError
from fusion.messages import JoinRequest, JoinResponse
from fusion.tls import client_context, explain
from worker.config import WorkerConfig

_FIRST_DELAY, _LONGEST_DELAY = 1.0, 30.0


@dataclass(frozen=True, slots=True)
class Joined:
    """The coordinator's answer, and when this machine's clock says that it was asked and answered."""

    answer: JoinResponse
    asked_at: float
    answered_at: float


async def join(
    session: aiohttp.ClientSession,
    url: str,
    token: str | None,
    request: JoinRequest,
    say: Callable[[str], None],
    key: str | None = None,
) -> Joined:
    """Join, however long it takes until the coordinator answers, and does not want to be asked again; `say` hears why it
    takes long.

    With its public `key` no other coordinator will do. Raises `VersionError` (other protocol version) or `CoordinatorError`
    (wrong token, name taken, any other refusal).
    """
    delay, waiting = _FIRST_DELAY, False
    while True:
        try:
            return await ask(session, url, token, request, key)
        except AskAgainError as error:
            if not waiting:
                say(f"{error}; asking again until then")
            waiting = True
            await asyncio.sleep(error.seconds)
            continue
        except UnreachableError as error:
            say(f"{error}; trying again in {delay:.0f} s")
        await asyncio.sleep(delay)
        delay = min(2 * delay, _LONGEST_DELAY)


async def ask(
    session: aiohttp.ClientSession, url: str, token: str | None, request: JoinRequest, key: str | None = None
) -> Joined:
    """Ask once. Raises also `UnreachableError`, or `AskAgainError` when the answer may soon be another."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    asked_at = time()
    try:
        async with session.post(
            f"{url}/api/v1/workers", json=request.model_dump(mode="json"), headers=headers
        ) as answer:
            if answer.status in (200, 201):
                joined = JoinResponse.model_validate(await answer.json(content_type=None))
                if key is not None and joined.control_public_key != key:
                    raise CoordinatorError(
                        f"what answers at {url} has another key than the join command says; copy a fresh one"
                    )
                return Joined(joined, asked_at, time())
            reason = await _reason(answer)
            status, again = answer.status, answer.headers.get("Retry-After", "")
    except aiohttp.ServerFingerprintMismatch:
        raise CoordinatorError(
            f"what answers at {url} has another certificate than the join command says; copy a fresh one"
        ) from None
    except (aiohttp.ClientConnectorSSLError, aiohttp.ClientConnectorCertificateError) as error:
        raise CoordinatorError(f"can't trust the coordinator at {url}: {_tls_reason(error)}") from None
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise UnreachableError(f"can't reach the coordinator at {url} ({_short(error)})") from None
    except (ValidationError, ValueError):
        raise CoordinatorError(f"what answers at {url} is no Fusion coordinator; check --join") from None
    if status in (401, 403):
        hint = "its token is not right" if token else "it wants a token"
        advice = f"{hint}; use the join command that it printed, or one of `fusion token create`"
        # An expired, used up or revoked token is named with its end.
        told = reason if reason.startswith("token ") else advice
        raise CoordinatorError(f"the coordinator at {url} refused this worker: {told}", status)
    if status == 426:
        raise VersionError(f"the coordinator at {url} refused this worker: {reason}")
    if status in (502, 503, 504):
        raise UnreachableError(f"the coordinator at {url} is not ready ({reason})")
    refusal = f"the coordinator at {url} refused this worker: {reason} ({status})"
    if status == 409 and again.isdecimal():
        raise AskAgainError(refusal, status, min(max(1.0, float(again)), _LONGEST_DELAY))
    raise CoordinatorError(refusal, status)


def address_towards(url: str) -> str:
    """Our own address on the way to this coordinator: loopback for loopback. Raises `UnreachableError`."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 80
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UnreachableError(f"can't find a way to the coordinator at {host} ({_short(error)})") from None


def connector(config: WorkerConfig) -> aiohttp.TCPConnector:
    """Connections to the coordinator alone: it is known by the join URL's fingerprint, `tls_ca`, or the machine's authorities.

    Raises `UserError`.
    """
    if not config.coordinator.startswith("https:"):
        return aiohttp.TCPConnector()
    if config.tls_ca is None and config.fingerprint is not None:
        return aiohttp.TCPConnector(ssl=aiohttp.Fingerprint(config.fingerprint))
    return aiohttp.TCPConnector(ssl=client_context(config.tls_ca))


def _tls_reason(error: aiohttp.ClientConnectorSSLError | aiohttp.ClientConnectorCertificateError) -> str:
    cause = error.certificate_error if isinstance(error, aiohttp.ClientConnectorCertificateError) else error.os_error
    return explain(cause, error.host) if isinstance(cause, ssl.SSLError) else str(cause)


async def _reason(answer: aiohttp.ClientResponse) -> str:
    try:
        body = await answer.json(content_type=None)
        return " ".join(str(body["error"]).split())
    except (ValueError, KeyError, TypeError):
        return answer.reason or "no reason given"


def _short(error: BaseException) -> str:
    cause = getattr(error, "os_error", None) or error
    return " ".join((getattr(cause, "strerror", None) or str(cause) or type(cause).__name__).split())
