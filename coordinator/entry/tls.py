"""The coordinator's certificate: loads it, tries it in a handshake with itself, and knows the names that it is for."""

from __future__ import annotations

import hashlib
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from fusion.errors import UserError
from fusion.tls import explain

_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class ServerTls:
    """A certificate that works."""

    context: ssl.SSLContext
    certificate: Path
    names: tuple[str, ...]
    """Host names and addresses that it is for, as it has them."""
    fingerprint: str
    """SHA-256 of the certificate, by which a worker knows it without an authority."""
    known: bool
    """Whether an authority that this machine trusts signed it."""

    def covers(self, host: str) -> bool:
        return any(_fits(name, host) for name in self.names)

    def public_host(self, host: str) -> str:
        """`host` if the certificate is for it, else the first plain name that it is for."""
        plain = [name for name in self.names if not name.startswith("*")]
        return host if self.covers(host) or not plain else plain[0]


def load_tls(certificate: Path | None, key: Path | None) -> ServerTls | None:
    """None without certificate. Raises `UserError`, in one line, for whatever would make every handshake fail."""
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        given, missing = ("--tls-key", "--tls-cert") if certificate is None else ("--tls-cert", "--tls-key")
        raise UserError(f"{given} needs {missing}: TLS takes a certificate and its key")
    for flag, file in (("--tls-cert", certificate), ("--tls-key", key)):
        try:
            file.read_bytes()
        except OSError as error:
            raise UserError(f"{flag} {file}: can't be read: {error.strerror or error}") from None
    context = _server_context(certificate, key)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    trusting.load_verify_locations(cafile=certificate)
    try:
        client = _handshake(context, trusting)
    except ssl.SSLError as error:
        what = explain(error, "this coordinator").removeprefix("its certificate ")
        raise UserError(f"--tls-cert {certificate}: the certificate {what}") from None
    shown = client.getpeercert() or {}
    der = client.getpeercert(binary_form=True) or b""
    return ServerTls(context, certificate.resolve(), _names(shown), hashlib.sha256(der).hexdigest(), _is_known(context))


def _server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except _PassphraseError:
        raise UserError(f"--tls-key {key}: is protected by a passphrase; give a key without one, mode 0600") from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UserError(f"--tls-key {key}: does not belong to the certificate {certificate}") from None
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=certificate)
        except ssl.SSLError:
            raise UserError(f"--tls-cert {certificate}: holds no certificate in PEM form") from None
        raise UserError(f"--tls-key {key}: holds no private key in PEM form") from None
    return context


class _PassphraseError(Exception):
    """OpenSSL wants a passphrase, and would ask at the terminal."""


def _no_passphrase() -> str:
    raise _PassphraseError


def _handshake(server_side: ssl.SSLContext, client_side: ssl.SSLContext) -> ssl.SSLObject:
    """Both ends in memory; returns the client's. Raises `ssl.SSLError`."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_side.wrap_bio(to_client, to_server)
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(_ROUNDS):
        waiting = 0
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting += 1
        if not waiting:
            break
    return client


def _is_known(server_side: ssl.SSLContext) -> bool:
    known = ssl.create_default_context()
    known.check_hostname = False
    try:
        _handshake(server_side, known)
    except ssl.SSLError:
        return False
    return True


def _names(shown: object) -> tuple[str, ...]:
    assert isinstance(shown, dict)
    return tuple(str(name) for kind, name in shown.get("subjectAltName", ()) if kind in ("DNS", "IP Address"))


def _fits(name: str, host: str) -> bool:
    try:
        return ipaddress.ip_address(name) == ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        pass
    name, host = name.lower(), host.lower()
    return name == host or (name.startswith("*.") and host.partition(".")[2] == name[2:])
