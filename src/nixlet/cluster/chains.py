"""Chains of certificates: an authority of servers may itself be signed by another one."""

from cryptography.hazmat.primitives import serialization

from nixlet import errors
from nixlet.cluster import constraints, signing


def root(bundle: bytes) -> bytes | None:
    """The root that all certificates of an authority lead to, in DER form; None: there is none, or the first one is its own.

    All, since whoever trusts an authority trusts each certificate in its file: a stranger's may not come along with a chain that is known.
    And each has to be an authority's, by itself and by those above it: a server or a node that was given a certificate is none.

    Raises:
        InvalidArgumentError: There are no certificates.
    """
    try:
        certificates = signing.parse_certificates(bundle)
    except signing.Unreadable as error:
        raise errors.InvalidArgumentError(f"the certificate authority's file {error}") from error
    if not all(constraints.is_authority(each) for each in certificates):
        return None
    roots = [each for each in certificates if signing.is_signed_by(each, each)]
    if len(roots) != 1 or roots[0] == certificates[0]:
        return None
    #: How many authorities may still be below each that is known.
    room = {roots[0]: constraints.path_length(roots[0])}
    left = [each for each in certificates if each != roots[0]]
    while left:
        signed = {}
        for each in left:
            above = [below for issuer, below in room.items() if below > 0 and signing.is_signed_by(each, issuer)]
            if above:
                signed[each] = min(max(above) - 1, constraints.path_length(each))
        if not signed:
            return None
        room |= signed
        left = [each for each in left if each not in signed]
    return roots[0].public_bytes(serialization.Encoding.DER)
