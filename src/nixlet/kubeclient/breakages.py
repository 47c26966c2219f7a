"""Connections that can't be made, or break, in words: what TLS and the kernel say of it."""

import socket
import ssl

from nixlet import errors
from nixlet.kubeclient import failures
from nixlet.kubeclient.endpoint import Endpoint

#: OpenSSL's codes for what is wrong with a certificate (x509_vfy.h).
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_ISSUER = frozenset({2, 18, 19, 20, 21})
_OTHER_HOST = frozenset({62, 64})

#: What a server says to a client whose certificate it doesn't take (TLS alerts, as OpenSSL calls them).
_REFUSALS = frozenset(
    (
        "SSLV3_ALERT_BAD_CERTIFICATE", "SSLV3_ALERT_CERTIFICATE_UNKNOWN", "SSLV3_ALERT_CERTIFICATE_EXPIRED", "SSLV3_ALERT_CERTIFICATE_REVOKED",
        "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE", "TLSV1_ALERT_UNKNOWN_CA", "TLSV1_ALERT_ACCESS_DENIED", "TLSV13_ALERT_CERTIFICATE_REQUIRED",
        "SSLV3_ALERT_HANDSHAKE_FAILURE",
    )
)  # fmt: skip


def of_transport(endpoint: Endpoint, error: Exception, seconds: float) -> errors.NixletError:
    """The error for a connection that can't be made, or breaks.

    Args:
        endpoint: Who was asked.
        error: What happened.
        seconds: How long the answer was waited for.
    """
    shown = endpoint.shown
    if isinstance(error, ssl.SSLCertVerificationError):
        return _stranger(endpoint, error)
    if isinstance(error, ssl.SSLError):
        if error.reason in _REFUSALS:
            return failures.UnauthenticatedError(
                f"{shown} refuses our certificate: it was signed by an authority that isn't known there, or has ended"
            )
        if error.reason in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"}:
            return errors.UnavailableError(
                f"{shown} speaks no TLS", hint="see that the address and the port are the API server's"
            )
        return errors.UnavailableError(
            f"the TLS connection to {shown} broke: {failures.words(error.reason or str(error))}"
        )
    if isinstance(error, socket.gaierror):
        return errors.UnavailableError(
            f"{shown} isn't found: {endpoint.host} can't be looked up ({error.strerror})",
            hint="see that the name is right, and that this machine's resolver answers",
        )
    if isinstance(error, TimeoutError) and error.errno is None:
        return errors.DeadlineExceededError(f"{shown} hasn't answered within {seconds:g} s")
    if isinstance(error, ConnectionRefusedError):
        return errors.UnavailableError(
            f"nothing listens where {shown} should be: connection refused",
            hint="see that it runs, and that address and port are right",
        )
    if isinstance(error, OSError) and error.strerror:
        return errors.UnavailableError(f"{shown} can't be reached: {error.strerror}")
    return errors.UnavailableError(f"{shown} ended the connection before its answer was whole")


def _stranger(endpoint: Endpoint, error: ssl.SSLCertVerificationError) -> errors.NixletError:
    shown = f"the certificate of {endpoint.shown}"
    match error.verify_code:
        case code if code == _EXPIRED:
            return failures.StrangerError(
                f"{shown} has ended", hint="the server's next start renews it; or this machine's clock is wrong"
            )
        case code if code == _NOT_YET_VALID:
            return failures.StrangerError(f"{shown} isn't valid yet", hint="set this machine's clock, or the server's")
        case code if code in _UNKNOWN_ISSUER:
            return failures.StrangerError(
                f"{shown} was signed by an authority that isn't known here",
                hint="another server may answer at that address, or the cluster was made anew",
            )
        case code if code in _OTHER_HOST:
            return failures.StrangerError(
                f"{shown} isn't for {endpoint.host}",
                hint="use a name or an address that it is for; the server's --tls-san adds one",
            )
        case _:
            return failures.StrangerError(f"{shown} isn't good: {failures.words(error.verify_message)}")
