"""Keys, certificates and the authorities that sign them: X.509 as Kubernetes' programs read it.

Importing this takes a tenth of a second, which nobody pays who makes or reads no certificate: it is imported where that is done.
Keys never come into errors, and neither do the causes of errors about them.
"""

import contextlib
import datetime
import os
import re
import stat
from typing import NamedTuple

from cryptography import exceptions, x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nixlet import errors
from nixlet.cluster import clock, constraints
from nixlet.cluster.settings import Address
from nixlet.cluster.subjects import Subject
from nixlet.host import files

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

#: How long authorities and what they sign are valid, as k3s has it.
AUTHORITY_LIFE = datetime.timedelta(days=3650)
LIFE = datetime.timedelta(days=365)

#: How long before its end a certificate is renewed.
RENEWAL = datetime.timedelta(days=90)

#: What is signed is valid from a while ago: other machines' clocks may be behind ours.
_EARLIER = datetime.timedelta(hours=1)

_PRIVATE_KEY = re.compile(rb"-----BEGIN ((?:[A-Z]+ )?PRIVATE KEY)-----.*?-----END \1-----", re.DOTALL)


class Pair(NamedTuple):
    """The files of a certificate and its key."""

    certificate: str
    key: str

    @classmethod
    def at(cls, stem: str) -> "Pair":
        """The files of this name, without what tells them apart."""
        return cls(f"{stem}.crt", f"{stem}.key")


class Unreadable(Exception):
    """What a file holds is no key, or no certificate; the text says of the file what is wrong with it."""


def _read(path: str) -> bytes | None:
    """What a file holds; None where there is none.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise files.refused(f"{path} can't be read", error) from error


def new_key() -> Key:
    """A new private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_text(key: Key) -> bytes:
    """A private key for its file: in the form that all of Kubernetes' programs read, also where they want the public half only."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def write_key(path: str, key: Key) -> None:
    """Write a private key for its owner alone.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    files.write_atomically(path, key_text(key), mode=0o600)


def keep_private(path: str) -> None:
    """Take away the rights that others have to a key's file of ours, if it is there.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    with files.refusing(f"{path} can't be kept from others"), contextlib.suppress(FileNotFoundError):
        status = os.lstat(path)
        # A link leads to what is somebody else's.
        if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077 and status.st_uid == os.geteuid():
            os.chmod(path, 0o600)


def read_key(path: str) -> Key | None:
    """The first private key of a file; None where there is no file.

    Raises:
        Unreadable: It holds none, or none that signs.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    data = _read(path)
    if data is None:
        return None
    match = _PRIVATE_KEY.search(data)
    if match is None:
        raise Unreadable("holds no private key")
    try:
        key = serialization.load_pem_private_key(match[0], password=None)
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm):
        raise Unreadable("holds a private key that can't be read, or is encrypted") from None
    if not isinstance(key, Key):
        raise Unreadable("holds a private key of a kind that isn't supported: ECDSA and RSA are")
    return key


def read_certificates(path: str) -> list[x509.Certificate] | None:
    """The certificates of a file, the one that it is about first; None where there is no file.

    Raises:
        Unreadable: It holds none.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    data = _read(path)
    if data is None:
        return None
    return parse_certificates(data)


def parse_certificates(data: bytes) -> list[x509.Certificate]:
    """Certificates in PEM form, at least one.

    Raises:
        Unreadable: There is none, or one of them is none.
    """
    try:
        found = x509.load_pem_x509_certificates(data)
        for certificate in found:
            # What is wrong with names and extensions shows only when they are looked at.
            certificate.subject, certificate.extensions, certificate.public_key()
    except (
        ValueError,
        exceptions.UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    ) as error:
        raise Unreadable("holds no certificate") from error
    return found


def certificates_text(certificates: list[x509.Certificate]) -> bytes:
    """Certificates in PEM form."""
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


def is_of(certificate: x509.Certificate, key: Key) -> bool:
    """Whether a certificate is for a key."""
    return _encoded(certificate.public_key()) == _encoded(key.public_key())


def is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether a certificate was signed by the key of another one, or by its own."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, exceptions.InvalidSignature, exceptions.UnsupportedAlgorithm):
        return False
    return True


def _encoded(key: object) -> bytes:
    if not isinstance(key, PublicKey):
        return b""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def subject_of(certificate: x509.Certificate) -> Subject:
    """What a certificate says."""
    name, extensions = certificate.subject, certificate.extensions
    common = [str(each.value) for each in name.get_attributes_for_oid(NameOID.COMMON_NAME)]
    organizations = tuple(str(each.value) for each in name.get_attributes_for_oid(NameOID.ORGANIZATION_NAME))
    subject = Subject(common[0] if common else "", organizations)
    dns: list[str] = []
    addresses: list[Address] = []
    try:
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns = names.get_values_for_type(x509.DNSName)
        # (ranges of addresses are for authorities' constraints)
        addresses = [each for each in names.get_values_for_type(x509.IPAddress) if isinstance(each, Address)]
    except x509.ExtensionNotFound:
        pass
    try:
        usages = list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        usages = []
    return Subject(
        subject.common_name,
        organizations,
        tuple(dns),
        tuple(addresses),
        client=ExtendedKeyUsageOID.CLIENT_AUTH in usages,
        server=ExtendedKeyUsageOID.SERVER_AUTH in usages,
    )


class Authority:
    """A certificate authority: its certificates, the one that signs first, and its key."""

    def __init__(self, file: str, certificates: list[x509.Certificate], key: Key) -> None:
        self.file = file
        self.certificates = certificates
        self._key = key

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate that it signs as."""
        return self.certificates[0]

    def _chain(self) -> list[x509.Certificate]:
        """The certificate that it signs as and those above; others in the file, former ones for instance, speak for what they have signed."""
        chain = [self.certificate]
        for certificate in chain:
            chain += [each for each in self.certificates if each not in chain and is_signed_by(certificate, each)]
        return chain

    @property
    def ends(self) -> datetime.datetime:
        """When the first certificate of its chain ends."""
        return min(certificate.not_valid_after_utc for certificate in self._chain())

    @property
    def begins(self) -> datetime.datetime:
        """When the last certificate of its chain begins to be valid."""
        return max(certificate.not_valid_before_utc for certificate in self._chain())

    def check_time(self, now: datetime.datetime) -> None:
        """Check that what it signs is worth something now.

        Raises:
            FailedPreconditionError: It isn't valid yet, or no more.
        """
        if now < self.begins:
            raise errors.FailedPreconditionError(
                f"the certificate authority {self.file} is valid from {clock.day(self.begins)}, and this machine's clock says {clock.day(now)}",
                hint="set the clock",
            )
        if now >= self.ends:
            raise errors.FailedPreconditionError(
                f"the certificate authority {self.file} has ended on {clock.day(self.ends)}, and this machine's clock says {clock.day(now)}",
                hint="set the clock, or give the cluster a new authority: its nodes will have to join anew",
            )

    def signed(self, certificate: x509.Certificate) -> bool:
        """Whether it has signed a certificate."""
        return is_signed_by(certificate, self.certificate)

    def issue(self, subject: Subject, key: PublicKey, now: datetime.datetime) -> list[x509.Certificate]:
        """A certificate for a key, followed by the authority's own.

        Raises:
            FailedPreconditionError: The authority isn't valid now.
        """
        self.check_time(now)
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dict.fromkeys(subject.dns)]
        names += [x509.IPAddress(address) for address in dict.fromkeys(subject.addresses)]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] if subject.server else []
        usages += [ExtendedKeyUsageOID.CLIENT_AUTH] if subject.client else []
        own = self.certificate.extensions
        try:
            ours = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                own.get_extension_for_class(x509.SubjectKeyIdentifier).value
            )
        except x509.ExtensionNotFound:
            ours = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = (
            _builder(_name(subject), key, max(now - _EARLIER, self.begins), min(now + LIFE, self.ends))
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(rsa_key=isinstance(key, rsa.RSAPublicKey)), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(ours, critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return [builder.sign(self._key, hashes.SHA256()), *self.certificates]


def make_authority(name: str, key: Key, now: datetime.datetime) -> x509.Certificate:
    """The certificate of a new authority, signed by itself.

    Raises:
        FailedPreconditionError: The clock was never set.
    """
    clock.check(now)
    # As k3s has it: two authorities that were made for the same can be told apart.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name}@{int(now.timestamp())}")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        _builder(subject, key.public_key(), now - _EARLIER, now + AUTHORITY_LIFE)
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )


def read_authority(pair: Pair) -> Authority:
    """An authority that is there, whole.

    Raises:
        FailedPreconditionError: A file of it is missing or can't be read, they don't belong together, or it is none.
        NixletError: The file system refuses, as in ``files.refused``.
    """
    file = pair.certificate
    try:
        certificates = read_certificates(file)
        file = pair.key
        key = read_key(file)
    except Unreadable as error:
        raise _broken(f"the certificate authority's file {file} {error}") from error
    if certificates is None:
        beside = "" if key is None else ", and its key is there"
        raise _broken(f"the certificate authority {pair.certificate} is missing{beside}")
    if key is None:
        raise _broken(f"the key {pair.key} of the certificate authority is missing")
    if not is_of(certificates[0], key):
        raise _broken(f"the key {pair.key} is not that of the certificate authority {pair.certificate}")
    # All: whoever is given the file believes each.
    if not all(constraints.is_authority(each) for each in certificates):
        which = "the certificate" if len(certificates) == 1 else "a certificate"
        raise _broken(f"{which} in {pair.certificate} is not that of an authority that may sign others")
    if not constraints.is_strong(key):
        raise _broken(f"the key {pair.key} of the certificate authority is too weak, or of an unknown kind")
    return Authority(pair.certificate, certificates, key)


def _broken(message: str) -> errors.FailedPreconditionError:
    return errors.FailedPreconditionError(
        message,
        hint="bring back both files from a backup; nothing here overwrites them, since all that was signed would be lost",
    )


def _name(subject: Subject) -> x509.Name:
    groups = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in subject.organizations]
    return x509.Name([*groups, x509.NameAttribute(NameOID.COMMON_NAME, subject.common_name)])


def _builder(
    name: x509.Name, key: PublicKey, begins: datetime.datetime, ends: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins.replace(microsecond=0))
        .not_valid_after(ends.replace(microsecond=0))
    )


def _key_usage(*, authority: bool = False, rsa_key: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        # Only RSA keys encipher others.
        key_encipherment=rsa_key,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
