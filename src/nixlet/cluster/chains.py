"""Chains of certificates: an authority of servers may itself be signed by another one."""

from cryptography.hazmat.primitives import serialization

from nixlet import errors
from nixlet.cluster import signing


def root(bundle: bytes) -> bytes | None:
    """The root that all certificates of an authority lead to, in DER form; None: there is none, or the first one is its own.

    All, since whoever trusts an authority trusts each certificate in its file: a stranger's may not come along with a chain that is known.

    Raises:
        InvalidArgumentError: There are no certificates.
    """
    try:
        certificates = signing.parse_certificates(bundle)
    except signing.Unreadable as error:
        raise errors.InvalidArgumentError(f"the certificate authority's file {error}") from error
    roots = [each for each in certificates if signing.is_signed_by(each, each)]
    if len(roots) != 1 or roots[0] == certificates[0]:
        return None
    known, left = roots, [each for each in certificates if each != roots[0]]
    while left:
        signed = [each for each in left if any(signing.is_signed_by(each, issuer) for issuer in known)]
        if not signed:
            return None
        known = known + signed
        left = [each for each in left if each not in signed]
    return roots[0].public_bytes(serialization.Encoding.DER)
