"""What a certificate and a key have to be, for others to be believed by them."""

import sys

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

#: What keys of others are good enough: those that Kubernetes' programs make and read, and what nobody breaks.
_CURVES = frozenset(("secp256r1", "secp384r1", "secp521r1"))
_SMALLEST_RSA = 2048

#: How many authorities may be below one that says nothing of it.
_UNLIMITED = sys.maxsize


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether a certificate is an authority's: whether what its key signs as another certificate counts (RFC 5280, 6.1.4 k and n)."""
    extensions = certificate.extensions
    try:
        if not extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return False
    except x509.ExtensionNotFound:
        return False
    try:
        return extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return True


def path_length(authority: x509.Certificate) -> int:
    """How many authorities may be below this one, one under the other."""
    length = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
    return _UNLIMITED if length is None else length


def is_strong(key: object) -> bool:
    """Whether a public key, or a private one, is of a kind and size that is good enough."""
    if isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey):
        return key.key_size >= _SMALLEST_RSA
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        return key.curve.name in _CURVES
    return False
