"""What is needed to recognise a server, and to be recognised: TLS from the files or data of an endpoint."""

import os
import ssl
from typing import Self

from nixlet import errors
from nixlet.host import files
from nixlet.kubeclient.endpoint import Endpoint


class Trust:
    """The TLS of an endpoint, made anew when its files have changed: certificates are renewed while we run."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._context: ssl.SSLContext | None = None
        self._made_of: tuple[tuple[int, int, int], ...] = ()

    def context(self) -> ssl.SSLContext:
        """What a new connection is made with.

        Raises:
            FailedPreconditionError: A file is none of what it should be.
            NixletError: The file system refuses, as in ``files.refused``.
        """
        now = self._state()
        if self._context is None or now != self._made_of:
            # (two threads that come at once make two, and either is good)
            try:
                self._context, self._made_of = _made(self._endpoint), now
            except _UnfitError:
                # They are renewed one after the other. Until both are, the former ones are as good as they were.
                if self._context is None:
                    raise
        return self._context

    def _state(self) -> tuple[tuple[int, int, int], ...]:
        given = self._endpoint.credentials
        paths = [path for path in (self._endpoint.authority, given.certificate, given.key) if path]
        found = []
        for path in paths:
            with files.refusing(f"{path} can't be read"):
                status = os.stat(path)
            found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)


def _made(endpoint: Endpoint) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if endpoint.verified:
        # As Go has it: an authority that is believed needs no root above it.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        _load_authority(context, endpoint)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    _load_credentials(context, endpoint)
    return context


def _load_authority(context: ssl.SSLContext, endpoint: Endpoint) -> None:
    data, source = endpoint.authority_data, f"the certificate authority of {endpoint.what}"
    if endpoint.authority:
        source = f"the certificate authority's file {endpoint.authority}"
        with files.refusing(f"{source} can't be read"), open(endpoint.authority, "rb") as file:
            data = file.read()
    if not data and not endpoint.authority:
        context.load_default_certs()
        return
    try:
        context.load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
        raise errors.FailedPreconditionError(f"{source} holds no certificate") from error


def _load_credentials(context: ssl.SSLContext, endpoint: Endpoint) -> None:
    given = endpoint.credentials
    if not given.certificate and not given.certificate_data:
        return
    source = given.certificate or f"our certificate for {endpoint.what}"
    # OpenSSL reads files only. These are in memory, and ours alone.
    with (
        files.refusing(f"{source}, or its key, can't be read"),
        _Held(given.certificate, given.certificate_data) as certificate,
        _Held(given.key, given.key_data) as key,
    ):
        try:
            context.load_cert_chain(certificate.path, key.path, password=_no_password)
        except (ssl.SSLError, _Encrypted):
            # (its cause would be about a key)
            raise _UnfitError(
                f"{source} is no certificate, or its key is encrypted or another one's",
                hint="a kubeconfig file of the server's is whole; so are certificates after the server's next start",
            ) from None


class _UnfitError(errors.FailedPreconditionError):
    """A certificate and its key don't fit each other, or are none."""


class _Encrypted(Exception):
    """A key has a password, and OpenSSL would ask the terminal for it."""


def _no_password() -> bytes:
    raise _Encrypted


class _Held:
    """A file that OpenSSL reads: one that is there, or one in memory for the time of the context."""

    def __init__(self, path: str, data: bytes) -> None:
        self._fd = -1
        self.path = path
        if data:
            self._fd = os.memfd_create("nixlet", os.MFD_CLOEXEC)
            with open(self._fd, "wb", closefd=False) as file:
                file.write(data)
            self.path = f"/proc/self/fd/{self._fd}"

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
