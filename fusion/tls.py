"""TLS towards a coordinator: whom to trust, and what a failed handshake means in words."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from fusion.errors import UserError

CA_VARIABLE = "FUSION_TLS_CA"

# Numbers of OpenSSL's X509_V_ERR_...
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_ISSUER = (18, 19, 20, 21)
_OTHER_NAME = (62, 64)


def client_context(ca: str | Path | None = None) -> ssl.SSLContext:
    """Trusts the machine's authorities, or only the certificates in `ca` (a server's own, or its authority's).

    Without `ca` the environment may name a file. Raises `UserError` when it is of no use.
    """
    file = str(ca or os.environ.get(CA_VARIABLE) or "")
    if not file:
        return ssl.create_default_context()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # A server's own certificate is enough, whoever signed it.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cafile=file)
    except ssl.SSLError:
        raise UserError(f"--tls-ca {file}: holds no certificate in PEM form") from None
    except OSError as error:
        raise UserError(f"--tls-ca {file}: can't be read: {error.strerror or error}") from None
    return context


def explain(error: ssl.SSLError, host: str) -> str:
    """Why there is no TLS connection to `host`, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        code = error.verify_code
        if code in _OTHER_NAME:
            return f"its certificate is not for {host}; use a name that it has, or give the coordinator one for {host}"
        if code in _UNKNOWN_ISSUER:
            return (
                "no authority that this machine knows signed its certificate; give --tls-ca FILE "
                f"(or set {CA_VARIABLE}) with that certificate or its authority's"
            )
        if code == _EXPIRED:
            return "its certificate has expired; give the coordinator a new one"
        if code == _NOT_YET_VALID:
            return "its certificate is not valid yet; compare the clocks of both machines"
        return f"its certificate is not accepted ({error.verify_message})"
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return "it does not speak TLS there; use http:// instead of https://"
    return f"TLS failed ({error.reason or error})"
