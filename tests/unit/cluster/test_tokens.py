"""Tokens by which nodes join."""

import contextlib
import hashlib
import os
import re
import threading
from concurrent import futures
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from hypothesis import given
from hypothesis import strategies as st

from nixlet import errors
from nixlet.cluster import signing, subjects, tokens
from nixlet.cluster.layout import Layout
from support import clusters

SECRET = "very-secret-word"
HASH = "ab" * 32


def authority(name: str = "one") -> bytes:
    return signing.certificates_text([signing.make_authority(name, signing.new_key(), clusters.NOW)])


@pytest.fixture
def places(tmp_path: Path) -> Layout:
    (tmp_path / "server").mkdir()
    return Layout(str(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("text", "token"),
    [
        (SECRET, tokens.Token("", SECRET)),
        (f"  {SECRET}\n", tokens.Token("", SECRET)),
        ("with:colon::and more"[:12], tokens.Token("", "with:colon::")),
        (f"K10{HASH}::server:{SECRET}", tokens.Token("server", SECRET, HASH)),
        (f"K10{HASH.upper()}::node:a:b::c", tokens.Token("node", "a:b::c", HASH)),
        ("abcdef.0123456789abcdef", tokens.Token("abcdef", "0123456789abcdef", bootstrap=True)),
        (f"K10{HASH}::abcdef.0123456789abcdef", tokens.Token("abcdef", "0123456789abcdef", HASH, bootstrap=True)),
        ("ABCDEF.0123456789abcdef", tokens.Token("", "ABCDEF.0123456789abcdef")),
    ],
)
def test_formats(text: str, token: tokens.Token) -> None:
    assert tokens.parse(text) == token


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (f"{SECRET} {SECRET}", "has blanks or control characters in it"),
        (f"{SECRET}\0", "has blanks or control characters in it"),
        (SECRET * 100, "is longer than 1024 characters"),
        (f"K10{SECRET}", "begins with K10 and lacks the part after ::"),
        (f"K10::server:{SECRET}", "has no SHA-256 sum between K10 and ::"),
        (f"K10{HASH[:-1]}::server:{SECRET}", "has no SHA-256 sum between K10 and ::"),
        (f"K10{HASH[:-1]}g::server:{SECRET}", "has no SHA-256 sum between K10 and ::"),
        (f"K10{HASH}::{SECRET}", "has no user and password after ::"),
        (f"K10{HASH}:::{SECRET}", "has no user and password after ::"),
        (f"K10{HASH}::server:", "has no user and password after ::"),
        (f"K10{HASH}::admin:{SECRET}", "is neither a server's nor a node's"),
    ],
)
def test_what_is_malformed_is_told_without_the_secret(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgumentError) as caught:
        tokens.parse(text)
    assert caught.value.message == f"the token {problem}"
    (tmp_path / "token").write_text(text)
    with pytest.raises(errors.InvalidArgumentError) as read:
        tokens.read(str(tmp_path / "token"))
    assert read.value.message == f"{tmp_path}/token holds no token: the token {problem}"
    for error in (caught.value, read.value):
        chain = f"{error!r} {error.hint} {error.__cause__!r}"
        assert SECRET not in chain
        assert HASH[:-1] not in chain


def test_a_token_does_not_show_its_secret(tmp_path: Path) -> None:
    token = tokens.parse(f"K10{HASH}::server:{SECRET}")
    assert SECRET not in f"{token} {token!r} {[token]}"
    (tmp_path / "token").write_bytes(b"\xff\xfe" + SECRET.encode())
    with pytest.raises(errors.InvalidArgumentError) as caught:
        tokens.read(str(tmp_path / "token"))
    assert caught.value.__cause__ is None
    with pytest.raises(errors.FailedPreconditionError, match=r"none can't be read: No such file or directory$"):
        tokens.read(str(tmp_path / "none"))


@given(st.text())
def test_any_text_is_a_token_or_told(text: str) -> None:
    with contextlib.suppress(errors.InvalidArgumentError):
        assert tokens.parse(text).password


def test_a_full_token_has_the_sum_of_the_authority_as_it_is_on_the_disk() -> None:
    bundle = authority()
    full = tokens.Token("server", SECRET).full(bundle)
    assert full == f"K10{hashlib.sha256(bundle).hexdigest()}::server:{SECRET}"
    tokens.parse(full).check_authority(bundle)
    with pytest.raises(errors.PermissionDeniedError) as caught:
        tokens.parse(full).check_authority(authority())
    assert SECRET not in f"{caught.value} {caught.value.hint}"
    # A short one knows no authority.
    tokens.parse(SECRET).check_authority(authority())
    bootstrap = tokens.new_bootstrap()
    assert tokens.parse(bootstrap.full(bundle)).credentials() == bootstrap.credentials()


@pytest.mark.parametrize("bundle", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\n" * 2])
def test_an_authority_that_is_none_is_told(bundle: bytes) -> None:
    with pytest.raises(errors.InvalidArgumentError, match=r"^the certificate authority's file holds no certificate$"):
        tokens.authority_hash(bundle)


def signed(name: str, issuer: x509.Certificate, key: signing.Key, issuer_key: signing.Key) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(clusters.NOW)
        .not_valid_after(clusters.NOW + clusters.DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )


def test_of_a_chain_the_root_counts() -> None:
    """An authority can be renewed under its root, and tokens stay good; a stranger's root may not come along with it."""
    keys = [signing.new_key() for _ in range(4)]
    root = signing.make_authority("root", keys[0], clusters.NOW)
    middle = signed("middle", root, keys[1], keys[0])
    first, renewed = (signed(name, middle, key, keys[1]) for name, key in (("one", keys[2]), ("two", keys[3])))
    fingerprint = hashlib.sha256(root.public_bytes(serialization.Encoding.DER)).hexdigest()
    for chain in ([first, middle, root], [renewed, root, middle]):
        assert tokens.authority_hash(signing.certificates_text(chain)) == fingerprint
    stranger = signing.make_authority("stranger", signing.new_key(), clusters.NOW)
    orphan = signed("orphan", middle, signing.new_key(), signing.new_key())
    for chain in (
        [first, middle],
        [first, middle, root, stranger],
        [first, middle, root, orphan],
        [root, first, middle],
    ):
        text = signing.certificates_text(chain)
        assert tokens.authority_hash(text) == hashlib.sha256(text).hexdigest()


def test_who_was_given_a_certificate_makes_no_authority_of_it(places: Layout) -> None:
    """A node's key, or a server's, signs what calls itself an authority below the cluster's root: a full token isn't deceived by that."""
    keys = [signing.new_key() for _ in range(4)]
    root = signing.make_authority("root", keys[0], clusters.NOW)
    middle = signed("middle", root, keys[1], keys[0])
    bundle = signing.certificates_text([middle, root])
    token = tokens.parse(tokens.Token("server", SECRET).full(bundle))
    token.check_authority(bundle)
    issuer = signing.Authority("", [middle, root], keys[1])
    leaf = issuer.issue(subjects.kubelet_serving("node-2", ()), keys[2].public_key(), clusters.NOW)[0]
    fake = signed("fake", leaf, keys[3], keys[2])
    for chain in ([fake, leaf, middle, root], [fake, root, middle, leaf], [leaf, middle, root]):
        with pytest.raises(errors.PermissionDeniedError):
            token.check_authority(signing.certificates_text(chain))


@pytest.mark.parametrize(
    ("lengths", "kept"), [((None, 0), True), ((1, 0), True), ((0, None), False), ((1, None), False), ((2, None), True)]
)
def test_a_chain_is_as_long_as_its_root_allows(lengths: tuple[int | None, int | None], kept: bool) -> None:
    keys = [signing.new_key() for _ in range(3)]
    own = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "root")])
    names = [own, *(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("one", "two"))]
    made = []
    for number, length in enumerate((lengths[0], lengths[1], None)):
        issuer = max(number - 1, 0)
        builder = x509.CertificateBuilder(
            names[issuer],
            names[number],
            keys[number].public_key(),
            1 + number,
            clusters.NOW,
            clusters.NOW + clusters.DAY,
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=length), critical=True)
        made.append(builder.sign(keys[issuer], hashes.SHA256()))
    root, one, two = made
    for chain, good in (([one, root], lengths[0] != 0), ([two, one, root], kept and lengths[1] != 0)):
        text = signing.certificates_text(chain)
        assert (tokens.authority_hash(text) != hashlib.sha256(text).hexdigest()) == good


def test_secrets_are_random_and_of_the_right_form() -> None:
    passwords = {tokens.new_password() for _ in range(50)}
    assert len(passwords) == 50
    assert all(re.fullmatch(r"[0-9a-f]{32}", each) for each in passwords)
    bootstrap = {tokens.new_bootstrap().credentials() for _ in range(50)}
    assert len(bootstrap) == 50
    assert all(re.fullmatch(r"[a-z0-9]{6}\.[a-z0-9]{16}", each) for each in bootstrap)


def test_secrets_are_compared_whole() -> None:
    assert tokens.same("ä", "ä")
    for one, other in (("a", "b"), ("a", "aa"), ("", "a"), ("ä", "a")):
        assert not tokens.same(one, other)
    assert tokens.parse(SECRET).same_secret(tokens.parse(f"K10{HASH}::server:{SECRET}"))


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_a_cluster_keeps_its_token(places: Layout, umask: int) -> None:
    bundle = authority()
    before = os.umask(umask)
    try:
        token = tokens.keep(places, bundle)
    finally:
        os.umask(before)
    path = Path(places.server, "token")
    assert path.read_text() == f"{token.full(bundle)}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    for name in ("node-token", "agent-token"):
        assert os.readlink(Path(places.server, name)) == "token"
    before_that = clusters.content(Path(places.server))
    assert tokens.keep(places, bundle) == token
    # Who gives the same one gives none.
    assert tokens.keep(places, bundle, given=token.password) == token
    assert tokens.keep(places, bundle, given=token.full(bundle)) == token
    assert clusters.content(Path(places.server)) == before_that
    assert sorted(os.listdir(places.server)) == [".lock", "agent-token", "node-token", "token"]


def test_a_token_that_was_given_is_the_cluster_s(places: Layout) -> None:
    bundle = authority()
    assert tokens.keep(places, bundle, given=SECRET, agent="for-agents").password == SECRET
    written = {name: Path(places.server, name).read_text() for name in ("token", "node-token", "agent-token")}
    total = hashlib.sha256(bundle).hexdigest()
    assert written == {
        "token": f"K10{total}::server:{SECRET}\n",
        "node-token": f"K10{total}::server:{SECRET}\n",
        "agent-token": f"K10{total}::node:for-agents\n",
    }
    assert Path(places.server, "agent-token").stat().st_mode & 0o777 == 0o600
    assert not Path(places.server, "agent-token").is_symlink()
    # And once agents have none of their own any more:
    tokens.keep(places, bundle)
    assert Path(places.server, "agent-token").is_symlink()
    assert Path(places.server, "token").read_text() == written["token"]


def test_another_token_than_the_cluster_s_is_refused(places: Layout) -> None:
    bundle = authority()
    tokens.keep(places, bundle)
    before = clusters.content(Path(places.server))
    other = tokens.Token("server", SECRET)
    for given_token, kind, message in (
        (SECRET, errors.FailedPreconditionError, f"the cluster in {places.data_dir} was made with another token"),
        (other.full(authority()), errors.PermissionDeniedError, "the server has another certificate authority than"),
        (
            "abcdef.0123456789abcdef",
            errors.InvalidArgumentError,
            "a bootstrap token can't be the token that a server joins by",
        ),
        (f"K10{HASH}::node:x", errors.InvalidArgumentError, "a node token can't be the token that a server joins by"),
        ("K10x", errors.InvalidArgumentError, "the token begins with K10"),
    ):
        with pytest.raises(kind) as caught:
            tokens.keep(places, bundle, given=given_token)
        assert caught.value.message.startswith(message)
        assert SECRET not in f"{caught.value} {caught.value.hint}"
    assert clusters.content(Path(places.server)) == before


def test_a_token_s_file_that_is_damaged_is_left_as_it_is(places: Layout) -> None:
    path = Path(places.server, "token")
    for text, message in (
        ("", "holds no token: the token is empty"),
        ("K10abc", "holds no token: the token begins with K10"),
        ("abcdef.0123456789abcdef\n", "holds a bootstrap token"),
    ):
        path.write_text(text)
        with pytest.raises(errors.InvalidArgumentError, match=message):
            tokens.keep(places, authority())
        assert path.read_text() == text


def test_a_new_authority_comes_into_the_token(places: Layout) -> None:
    token = tokens.keep(places, authority())
    renewed = authority()
    assert tokens.keep(places, renewed).password == token.password
    assert Path(places.server, "token").read_text() == f"{token.full(renewed)}\n"


@pytest.mark.parametrize("user", ["given", "agent"])
def test_what_could_not_be_read_again_is_refused(places: Layout, user: str) -> None:
    bundle = authority()
    for password, problem in (
        ("p\xe4ssword", "has other characters than ASCII's in it"),
        ("a" * 1000, "has a password of more than 9"),
    ):
        with pytest.raises(errors.InvalidArgumentError, match=problem) as caught:
            tokens.keep(places, bundle, **{user: password})
        assert password not in f"{caught.value}"
        assert {path.name for path in Path(places.server).iterdir()} == {".lock"}
    longest = 1024 - len(f"K10{HASH}::server:")
    tokens.keep(places, bundle, **{user: "a" * longest})
    tokens.keep(places, bundle, **{user: "a" * longest})


def test_a_node_s_token_does_not_become_a_server_s(places: Layout) -> None:
    bundle = authority()
    path = Path(places.server, "token")
    path.write_text(tokens.Token("node", SECRET).full(bundle))
    before = path.read_bytes()
    with pytest.raises(
        errors.InvalidArgumentError, match=r"server/token holds a node token, which can't be a server's"
    ):
        tokens.keep(places, bundle)
    assert path.read_bytes() == before


def test_two_at_once_have_one_token_or_are_told(places: Layout) -> None:
    bundle = authority()
    for _ in range(20):
        for path in Path(places.server).iterdir():
            path.unlink()
        both = threading.Barrier(2)

        def one(both: threading.Barrier = both) -> str:
            both.wait(60)
            with contextlib.suppress(errors.FailedPreconditionError):
                return tokens.keep(places, bundle).password
            return ""

        with futures.ThreadPoolExecutor(2) as pool:
            found = {task.result() for task in [pool.submit(one), pool.submit(one)]} - {""}
        assert found == {tokens.read(os.path.join(places.server, "token")).password}


def test_what_a_killed_one_left_goes(places: Layout) -> None:
    left, others = Path(places.server, ".token.abcd_123"), Path(places.server, ".other.abcd_123")
    for path in (left, others):
        path.write_text(SECRET)
    tokens.keep(places, authority())
    assert not left.exists()
    assert others.exists()
