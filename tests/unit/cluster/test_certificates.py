"""A cluster's certificates: what is made, kept, renewed, refused."""

import datetime
import ipaddress
import os
import shutil
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from nixlet import errors
from nixlet.cluster import certificates, findings, kubelet, programs, signing, tokens
from nixlet.cluster.findings import State
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import files
from support import clusters

NOW, DAY = clusters.NOW, clusters.DAY
YEAR = 365 * DAY


def made(settings: ClusterSettings, now: datetime.datetime = NOW) -> list[str]:
    """What a call of ensure has made, by names below the data directory."""
    return [os.path.relpath(each.file, settings.data_dir) for each in certificates.ensure(settings, now)]


def certificate(path: str) -> x509.Certificate:
    return x509.load_pem_x509_certificates(Path(path).read_bytes())[0]


def states(settings: ClusterSettings, now: datetime.datetime) -> dict[str, State]:
    return {os.path.relpath(each.file, settings.data_dir): each.state for each in findings.check(settings, now)}


@pytest.fixture
def settings(tmp_path: Path) -> ClusterSettings:
    return clusters.settings(tmp_path, tls_sans=("API.example.org", "198.51.100.4", "*.wild.example"))


def test_the_files_are_those_of_k3s(settings: ClusterSettings) -> None:
    made(settings)
    stems = [
        "tls/client-ca", "tls/server-ca", "tls/request-header-ca", "tls/etcd/server-ca", "tls/etcd/peer-ca",
        "tls/client-admin", "tls/client-kube-apiserver", "tls/serving-kube-apiserver", "tls/client-controller",
        "tls/client-scheduler", "tls/client-auth-proxy", "tls/etcd/client", "tls/etcd/server-client",
        "tls/etcd/peer-server-client",
    ]  # fmt: skip
    server = {f"server/{stem}.{kind}" for stem in stems for kind in ("crt", "key")}
    server |= {f"server/tls/{name}-ca.nochain.crt" for name in ("client", "server", "request-header")}
    server |= {f"server/tls/etcd/{name}-ca.nochain.crt" for name in ("server", "peer")}
    server |= {"server/tls/service.key", "server/tls/service.current.key"}
    node = {
        f"agent/{stem}.{kind}"
        for stem in ("client-kubelet", "serving-kubelet", "client-kube-proxy")
        for kind in ("crt", "key")
    }
    node |= {"agent/client-ca.crt", "agent/server-ca.crt"}
    assert set(clusters.content(Path(settings.data_dir))) == server | node


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_modes_are_what_they_are_whatever_the_umask_is(settings: ClusterSettings, umask: int) -> None:
    before = os.umask(umask)
    try:
        made(settings)
    finally:
        os.umask(before)
    data = Path(settings.data_dir)
    modes = {str(path.relative_to(data)): path.stat().st_mode & 0o777 for path in data.rglob("*")}
    directories = {"server": 0o700, "server/tls": 0o700, "server/tls/etcd": 0o700, "server/cred": 0o700, "agent": 0o755}
    assert {name: mode for name, mode in modes.items() if (data / name).is_dir()} == directories
    keys = {name: mode for name, mode in modes.items() if name.endswith(".key")}
    assert len(keys) == 19
    assert set(keys.values()) == {0o600}
    assert {mode for name, mode in modes.items() if name.endswith(".crt")} == {0o644}


def test_what_fits_is_kept_to_the_byte(settings: ClusterSettings) -> None:
    assert len(made(settings)) == 18
    before = clusters.content(Path(settings.data_dir))
    assert made(settings, NOW + 200 * DAY) == []
    assert clusters.content(Path(settings.data_dir)) == before


def test_subjects_are_those_that_kubernetes_knows(settings: ClusterSettings) -> None:
    made(settings)
    seen = {}
    for each in findings.check(settings, NOW):
        assert each.subject is not None
        if each.service != findings.AUTHORITIES:
            uses = (each.subject.client, each.subject.server)
            seen[os.path.basename(each.file)] = (each.subject.common_name, each.subject.organizations, uses)
    client, server, both = (True, False), (False, True), (True, True)
    assert seen == {
        "client-admin.crt": ("system:admin", ("system:masters",), client),
        "client-kube-apiserver.crt": ("system:apiserver", (), client),
        "serving-kube-apiserver.crt": ("kube-apiserver", (), server),
        "client-controller.crt": ("system:kube-controller-manager", (), client),
        "client-scheduler.crt": ("system:kube-scheduler", (), client),
        "client-auth-proxy.crt": ("system:auth-proxy", (), client),
        "client.crt": ("etcd-client", (), client),
        "server-client.crt": ("etcd-server", (), both),
        "peer-server-client.crt": ("etcd-peer", (), both),
        "client-kubelet.crt": ("system:node:node-1", ("system:nodes",), client),
        "serving-kubelet.crt": ("node-1", (), server),
        "client-kube-proxy.crt": ("system:kube-proxy", (), client),
    }


def test_the_api_server_is_known_by_all_its_names(settings: ClusterSettings) -> None:
    made(settings)
    found = signing.subject_of(certificate(settings.layout.tls("serving-kube-apiserver.crt")))
    assert set(found.names) == {
        "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local", "localhost",
        "node-1", "api.example.org", "*.wild.example", "127.0.0.1", "::1", "192.0.2.7", "198.51.100.4", "10.43.0.1",
    }  # fmt: skip


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> str:
    """The user that a server knows its client as, after both have looked at each other's certificates."""
    wires = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(wires[0], wires[1], server_side=True)
    theirs = client.wrap_bio(wires[1], wires[0], server_hostname=name)
    for _ in range(8):
        for side in (theirs, ours):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    theirs.write(b"x")
    assert ours.read(1) == b"x"
    shown = ours.getpeercert()
    assert shown is not None
    names: Any = shown["subject"]
    return str(dict(part for rdn in names for part in rdn)["commonName"])


def context(purpose: int, authority: str, stem: str) -> ssl.SSLContext:
    found = ssl.SSLContext(purpose)
    found.load_verify_locations(authority)
    found.load_cert_chain(*signing.Pair.at(stem))
    found.verify_mode = ssl.CERT_REQUIRED
    found.verify_flags |= ssl.VERIFY_X509_STRICT
    return found


@pytest.mark.parametrize(
    ("server", "client", "authorities", "name", "user"),
    [
        ("serving-kube-apiserver", "client-admin", ("client-ca", "server-ca"), "kubernetes.default.svc", "system:admin"),
        ("serving-kube-apiserver", "client-scheduler", ("client-ca", "server-ca"), "10.43.0.1", "system:kube-scheduler"),
        ("../../agent/serving-kubelet", "client-kube-apiserver", ("client-ca", "server-ca"), "192.0.2.7", "system:apiserver"),
        ("serving-kube-apiserver", "../../agent/client-kubelet", ("client-ca", "server-ca"), "::1", "system:node:node-1"),
        ("etcd/server-client", "etcd/client", ("etcd/server-ca", "etcd/server-ca"), "127.0.0.1", "etcd-client"),
        ("etcd/peer-server-client", "etcd/peer-server-client", ("etcd/peer-ca", "etcd/peer-ca"), "192.0.2.7", "etcd-peer"),
        ("serving-kube-apiserver", "client-auth-proxy", ("request-header-ca", "server-ca"), "localhost", "system:auth-proxy"),
    ],
)  # fmt: skip
def test_both_sides_believe_each_other(
    tmp_path: Path, server: str, client: str, authorities: tuple[str, str], name: str, user: str
) -> None:
    settings = clusters.settings(tmp_path)
    # TLS has the machine's clock.
    made(settings, datetime.datetime.now(datetime.UTC))
    tls = settings.layout.tls
    of_clients, of_servers = (tls(f"{authority}.crt") for authority in authorities)
    serving = context(ssl.PROTOCOL_TLS_SERVER, of_clients, tls(server))
    assert handshake(serving, context(ssl.PROTOCOL_TLS_CLIENT, of_servers, tls(client)), name) == user
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(serving, context(ssl.PROTOCOL_TLS_CLIENT, of_servers, tls(client)), "elsewhere.example")


def test_an_authority_speaks_for_its_own_only(tmp_path: Path) -> None:
    settings = clusters.settings(tmp_path)
    made(settings, datetime.datetime.now(datetime.UTC))
    tls = settings.layout.tls
    serving = context(ssl.PROTOCOL_TLS_SERVER, tls("client-ca.crt"), tls("serving-kube-apiserver"))
    for stranger in ("etcd/client", "client-auth-proxy", "serving-kube-apiserver"):
        client = context(ssl.PROTOCOL_TLS_CLIENT, tls("server-ca.crt"), tls(stranger))
        with pytest.raises(ssl.SSLError):
            handshake(serving, client, "localhost")


def test_lives_are_those_of_k3s_and_begin_a_little_earlier(settings: ClusterSettings) -> None:
    made(settings)
    authority, leaf = (certificate(settings.layout.tls(f"{name}.crt")) for name in ("client-ca", "client-admin"))
    second = NOW.replace(microsecond=0)
    assert authority.not_valid_after_utc == second + 3650 * DAY
    assert leaf.not_valid_after_utc == second + YEAR
    assert authority.not_valid_before_utc == leaf.not_valid_before_utc == second - datetime.timedelta(hours=1)
    assert signing.subject_of(authority).common_name == f"nixlet-client-ca@{int(NOW.timestamp())}"


def test_what_ends_soon_is_renewed_with_its_key(settings: ClusterSettings) -> None:
    made(settings)
    before = clusters.content(Path(settings.data_dir))
    assert made(settings, NOW + 274 * DAY) == []
    changes = certificates.ensure(settings, NOW + 275 * DAY)
    assert len(changes) == 12
    assert {each.reason for each in changes} == {"it ends on 2027-11-28 12:00 UTC"}
    after = clusters.content(Path(settings.data_dir))
    changed = {name for name, found in after.items() if found != before[name]}
    assert changed == {os.path.relpath(each.file, settings.data_dir) for each in changes}
    assert not any(name.endswith(".key") or "-ca." in name for name in changed)
    assert certificate(changes[0].file).not_valid_after_utc == (NOW + 275 * DAY + YEAR).replace(microsecond=0)


def test_one_that_has_ended_is_renewed(settings: ClusterSettings) -> None:
    made(settings)
    later = NOW + 500 * DAY
    assert set(states(settings, later).values()) == {State.VALID, State.ENDED}
    assert len(made(settings, later)) == 12
    assert set(states(settings, later).values()) == {State.VALID}


def test_nothing_is_renewed_in_vain_before_the_authority_ends(settings: ClusterSettings) -> None:
    made(settings)
    late = NOW + 3600 * DAY
    made(settings, late)
    end = certificate(settings.layout.tls("client-ca.crt")).not_valid_after_utc
    assert certificate(settings.layout.tls("client-admin.crt")).not_valid_after_utc == end
    assert made(settings, late + DAY) == []
    assert set(states(settings, late).values()) == {State.ENDING}
    with pytest.raises(
        errors.FailedPreconditionError, match=r"client-ca\.crt has ended on 2036-11-25 12:00 UTC, and this machine"
    ):
        made(settings, NOW + 3650 * DAY)


def test_one_that_no_longer_fits_is_made_anew(settings: ClusterSettings, tmp_path: Path) -> None:
    made(settings)
    moved = clusters.settings(tmp_path, node_ips=(ipaddress.ip_address("192.0.2.8"),), tls_sans=("api.example.org",))
    changes = {os.path.basename(each.file): each.reason for each in certificates.ensure(moved, NOW)}
    assert changes == {
        "serving-kube-apiserver.crt": "it lacks 192.0.2.8",
        "server-client.crt": "it lacks 192.0.2.8",
        "peer-server-client.crt": "it lacks 192.0.2.8",
        "serving-kubelet.crt": "it lacks 192.0.2.8",
    }
    # A name that was taken away goes as well.
    without = clusters.settings(tmp_path, node_ips=moved.node_ips)
    assert [each.reason for each in certificates.ensure(without, NOW)] == ["it has api.example.org as well"]
    renamed = clusters.settings(tmp_path, node_ips=moved.node_ips, node_name="node-2")
    reasons = {os.path.basename(each.file): each.reason for each in certificates.ensure(renamed, NOW)}
    assert reasons["client-kubelet.crt"] == "it is for 'system:node:node-1', and should be for 'system:node:node-2'"
    assert len(reasons) == 5


@pytest.mark.parametrize(
    "damage", ["no certificate", "no key", "cut off", "another key", "no key in the key", "another authority"]
)
def test_what_is_damaged_is_made_anew(settings: ClusterSettings, tmp_path: Path, damage: str) -> None:
    made(settings)
    stem = settings.layout.tls("client-admin")
    pair = signing.Pair.at(stem)
    match damage:
        case "no certificate":
            os.unlink(pair.certificate)
        case "no key":
            os.unlink(pair.key)
        case "cut off":
            os.truncate(pair.certificate, 100)
        case "another key":
            # A crash between the two files of a rotation.
            signing.write_key(pair.key, signing.new_key())
        case "no key in the key":
            os.truncate(pair.key, 40)
        case _:
            other = clusters.settings(tmp_path / "other")
            made(other)
            for kind in ("crt", "key"):
                shutil.copy(other.layout.tls(f"client-admin.{kind}"), f"{stem}.{kind}")
    if damage != "no certificate":
        assert states(settings, NOW)["server/tls/client-admin.crt"] == State.MISFIT
    assert made(settings) == ["server/tls/client-admin.crt"]
    assert set(states(settings, NOW).values()) == {State.VALID}
    assert made(settings) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no key", r"^the key \S+/server-ca\.key of the certificate authority is missing$"),
        ("no certificate", r"^the certificate authority \S+/server-ca\.crt is missing, and \S+serving-kube-apiserver\.crt was signed by it$"),
        ("another key", r"^the key \S+/server-ca\.key is not that of the certificate authority \S+/server-ca\.crt$"),
        ("cut off", r"^the certificate authority's file \S+/server-ca\.crt holds no certificate$"),
        ("no key in the key", r"^the certificate authority's file \S+/server-ca\.key holds no private key$"),
        ("encrypted", r"^the certificate authority's file \S+/server-ca\.key holds a private key that can't be read, or is encrypted$"),
        ("a leaf", r"^a certificate in \S+/server-ca\.crt is not that of an authority that may sign others$"),
        ("neither", r"^the certificate authority \S+/server-ca\.crt is missing, and \S+serving-kube-apiserver\.crt was signed by it$"),
    ],
)  # fmt: skip
def test_a_broken_authority_is_told_and_never_overwritten(settings: ClusterSettings, damage: str, message: str) -> None:
    made(settings)
    pair = signing.Pair.at(settings.layout.tls("server-ca"))
    key = signing.read_key(pair.key)
    assert key is not None
    match damage:
        case "no key":
            os.unlink(pair.key)
        case "no certificate":
            os.unlink(pair.certificate)
        case "another key":
            signing.write_key(pair.key, signing.new_key())
        case "cut off":
            os.truncate(pair.certificate, 100)
        case "no key in the key":
            os.truncate(pair.key, 40)
        case "encrypted":
            form = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
            Path(pair.key).write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
        case "a leaf":
            for kind in ("crt", "key"):
                shutil.copy(settings.layout.tls(f"client-admin.{kind}"), settings.layout.tls(f"server-ca.{kind}"))
        case _:
            os.unlink(pair.key)
            os.unlink(pair.certificate)
    before = clusters.content(Path(settings.data_dir))
    for attempt in (lambda: made(settings), lambda: certificates.rotate(settings, ["api-server"], NOW)):
        with pytest.raises(errors.FailedPreconditionError) as caught:
            attempt()
        assert "PRIVATE" not in caught.value.message
    with pytest.raises(errors.FailedPreconditionError, match=message):
        made(settings)
    assert clusters.content(Path(settings.data_dir)) == before
    wrong = State.MISSING if damage in {"no certificate", "neither"} else State.MISFIT
    assert states(settings, NOW)["server/tls/server-ca.crt"] == wrong


def test_a_start_that_is_cut_off_after_each_file_comes_to_its_end(
    settings: ClusterSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever file is the last one that is written, the next start goes on from there."""
    write, left = files.write_atomically, [0]

    def written(path: str, data: bytes | str, *, mode: int = 0o644, group: int = -1) -> None:
        if not os.path.exists(path) or Path(path).read_bytes() != data:
            if not left[0]:
                raise errors.ResourceExhaustedError("cut off")
            left[0] -= 1
        write(path, data, mode=mode, group=group)

    monkeypatch.setattr(files, "write_atomically", written)
    for rounds in range(1, 100):
        left[0] = 1
        try:
            made(settings)
        except errors.ResourceExhaustedError:
            assert len(clusters.content(Path(settings.data_dir))) == rounds
        else:
            break
    # Authorities, their copies, certificates, the key of service accounts.
    assert len(clusters.content(Path(settings.data_dir))) == 5 * 2 + 7 + 12 * 2 + 2
    assert set(states(settings, NOW).values()) == {State.VALID}


def test_an_authority_of_somebody_else_is_taken_as_it_is(settings: ClusterSettings) -> None:
    """k3s: whoever has an authority of their own puts it there, an intermediate one with its chain."""
    os.makedirs(settings.layout.tls(""))
    root_key, key = rsa.generate_private_key(65537, 2048), rsa.generate_private_key(65537, 2048)
    root = signing.make_authority("root", root_key, NOW)
    intermediate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ours")]))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + 1000 * DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    chain = signing.certificates_text([intermediate, root])
    pair = signing.Pair.at(settings.layout.tls("server-ca"))
    Path(pair.certificate).write_bytes(chain)
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    Path(pair.key).write_bytes(b"a comment\n" + key.private_bytes(serialization.Encoding.PEM, *form))
    os.chmod(pair.key, 0o644)
    before = Path(pair.key).read_bytes()
    made(settings)
    assert Path(pair.certificate).read_bytes() == chain
    assert Path(pair.key).read_bytes() == before
    # Nobody else may read it from now on.
    assert os.stat(pair.key).st_mode & 0o777 == 0o600
    leaf, *rest = x509.load_pem_x509_certificates(Path(settings.layout.tls("serving-kube-apiserver.crt")).read_bytes())
    leaf.verify_directly_issued_by(intermediate)
    assert rest == [intermediate, root]
    assert Path(settings.layout.tls("server-ca.nochain.crt")).read_bytes() == signing.certificates_text([intermediate])
    assert Path(settings.layout.node("server-ca.crt")).read_bytes() == chain
    assert made(settings) == []


def test_a_clock_that_is_behind_is_told(settings: ClusterSettings) -> None:
    made(settings)
    before = clusters.content(Path(settings.data_dir))
    early = NOW - 30 * DAY
    with pytest.raises(errors.FailedPreconditionError) as caught:
        made(settings, early)
    assert caught.value.message.endswith(
        "client-ca.crt is valid from 2026-11-28 11:00 UTC, and this machine's clock says 2026-10-29 12:00 UTC"
    )
    assert caught.value.hint == "set the clock"
    assert clusters.content(Path(settings.data_dir)) == before
    assert set(states(settings, early).values()) == {State.FUTURE}
    assert "clock says 2026-10-29" in findings.check(settings, early)[0].detail


def test_one_from_a_time_when_the_clock_was_ahead_is_made_anew(settings: ClusterSettings) -> None:
    made(settings)
    ahead = NOW + 3000 * DAY
    made(settings, ahead)
    assert [each.state for each in findings.check(settings, NOW)] == [State.VALID] * 5 + [State.FUTURE] * 12
    assert len(made(settings)) == 12
    assert set(states(settings, NOW).values()) == {State.VALID}


def test_nothing_is_made_by_a_clock_that_was_never_set(settings: ClusterSettings) -> None:
    with pytest.raises(errors.FailedPreconditionError, match="clock says 1970-01-01 00:07 UTC"):
        made(settings, datetime.datetime(1970, 1, 1, 0, 7, tzinfo=datetime.UTC))
    assert clusters.content(Path(settings.data_dir)) == {}
    assert len(made(settings)) == 18


def test_rotation_gives_new_keys_and_leaves_authorities(settings: ClusterSettings) -> None:
    made(settings)
    before = clusters.content(Path(settings.data_dir))
    changes = certificates.rotate(settings, ["kubelet", "admin"], NOW + DAY)
    assert [os.path.basename(each.file) for each in changes] == [
        "client-admin.crt",
        "client-kubelet.crt",
        "serving-kubelet.crt",
    ]
    after = clusters.content(Path(settings.data_dir))
    changed = {name for name, found in after.items() if found[0] != before[name][0]}
    assert changed == {
        f"{stem}.{kind}"
        for stem in ("server/tls/client-admin", "agent/client-kubelet", "agent/serving-kubelet")
        for kind in ("crt", "key")
    }
    assert made(settings, NOW + DAY) == []
    assert len(certificates.rotate(settings, [], NOW + DAY)) == 12
    everything = clusters.content(Path(settings.data_dir))
    kept = {name for name, found in everything.items() if found[0] == before[name][0]}
    assert kept == {name for name in before if "-ca." in name or "service." in name}
    assert made(settings, NOW + DAY) == []


def test_what_can_not_be_rotated_is_told(settings: ClusterSettings) -> None:
    with pytest.raises(
        errors.FailedPreconditionError, match=r"^there are no certificates in \S+: no server was started there yet$"
    ):
        certificates.rotate(settings, [], NOW)
    made(settings)
    with pytest.raises(errors.UsageError, match="no certificates belong to a service 'certificate-authority'"):
        certificates.rotate(settings, ["admin", "certificate-authority"], NOW)


def test_the_list_says_where_and_how_each_is(settings: ClusterSettings) -> None:
    assert set(states(settings, NOW).values()) == {State.MISSING}
    first = findings.check(settings, NOW)[0]
    assert first.detail == f"the certificate authority {settings.layout.tls('client-ca.crt')} is missing"
    made(settings)
    listed = findings.check(settings, NOW + 300 * DAY)
    assert [each.service for each in listed[:5]] == ["certificate-authority"] * 5
    (admin,) = (each for each in listed if each.service == "admin")
    assert admin.file == settings.layout.tls("client-admin.crt")
    assert admin.not_after == (NOW + YEAR).replace(microsecond=0)
    assert (admin.state, admin.detail) == (
        State.ENDING,
        "it ends on 2027-11-28 12:00 UTC; the node renews it while it runs, or when it starts",
    )


def test_two_at_once_are_told_apart(settings: ClusterSettings) -> None:
    made(settings)
    told = pytest.raises(errors.FailedPreconditionError, match=rf"server/tls is in use by process {os.getpid()}$")
    with files.exclusive_lock(settings.layout.tls(".lock"), what="x"), told:
        made(settings)


def test_the_key_of_service_accounts_is_kept_and_older_ones_with_it(settings: ClusterSettings) -> None:
    made(settings)
    path, current = (Path(settings.layout.tls(name)) for name in ("service.key", "service.current.key"))
    assert path.read_bytes().startswith(b"-----BEGIN EC PRIVATE KEY-----")
    old = path.read_bytes()
    both = signing.key_text(signing.new_key()) + old
    path.write_bytes(both)
    made(settings)
    assert path.read_bytes() == both
    assert current.read_bytes() == both.removesuffix(old)
    path.write_bytes(b"")
    with pytest.raises(errors.FailedPreconditionError, match=r"service\.key holds no private key$"):
        made(settings)
    assert path.read_bytes() == b""


def test_all_keys_are_p_256(settings: ClusterSettings) -> None:
    made(settings)
    for path in Path(settings.data_dir).rglob("*.key"):
        key = signing.read_key(str(path))
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp256r1"


def below(root: x509.Certificate, root_key: signing.Key, key: signing.Key) -> x509.Certificate:
    """An authority of the same name each time, below a root."""
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ours")]))
        .issuer_name(root.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(root.not_valid_before_utc)
        .not_valid_after(root.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(root_key, hashes.SHA256())
    )


def test_authorities_below_one_root_speak_each_for_its_own(tmp_path: Path) -> None:
    """What lets somebody in is given no chain, by which a kubelet would be let in at etcd."""
    settings = clusters.settings(tmp_path)
    tls, now = settings.layout.tls, datetime.datetime.now(datetime.UTC)
    os.makedirs(tls("etcd"))
    root_key = signing.new_key()
    root = signing.make_authority("root", root_key, now)
    for name in ("client-ca", "server-ca", "request-header-ca", "etcd/server-ca", "etcd/peer-ca"):
        key = signing.new_key()
        signing.write_key(tls(f"{name}.key"), key)
        Path(tls(f"{name}.crt")).write_bytes(signing.certificates_text([below(root, root_key, key), root]))
    made(settings, now)
    given = {
        key.removeprefix("--"): value
        for argv in (programs.etcd(settings), programs.kube_apiserver(settings))
        for key, _, value in (argument.partition("=") for argument in argv)
    }
    given["kubelet"] = yaml.safe_load(kubelet.configuration(settings, programs.Node("/a")))["authentication"]["x509"][
        "clientCAFile"
    ]
    for what, own in (
        ("trusted-ca-file", "etcd/server-ca"),
        ("peer-trusted-ca-file", "etcd/peer-ca"),
        ("client-ca-file", "client-ca"),
        ("requestheader-client-ca-file", "request-header-ca"),
        ("kubelet", "client-ca"),
    ):
        assert certificate(given[what]) == certificate(tls(f"{own}.crt"))
        assert Path(given[what]).read_bytes().count(b"BEGIN CERTIFICATE") == 1
    assert made(settings, now) == []


@pytest.mark.parametrize("weak", ["no signing", "RSA of 1024 bits", "secp256k1", "a leaf beside"])
def test_an_authority_that_nobody_would_believe_is_told(settings: ClusterSettings, weak: str) -> None:
    made(settings)
    pair = signing.Pair.at(settings.layout.tls("server-ca"))
    key: signing.Key = signing.new_key()
    match weak:
        case "RSA of 1024 bits":
            key = rsa.generate_private_key(65537, 1024)
        case "secp256k1":
            key = ec.generate_private_key(ec.SECP256K1())
        case _:
            pass
    found = signing.make_authority("ours", key, NOW)
    usage = found.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    if weak == "no signing":
        leaf = certificate(settings.layout.tls("client-admin.crt"))
        builder = x509.CertificateBuilder(found.issuer, found.subject, found.public_key(), 1, NOW - DAY, NOW + DAY)
        for extension in (
            found.extensions.get_extension_for_class(x509.BasicConstraints),
            leaf.extensions.get_extension_for_class(x509.KeyUsage),
        ):
            builder = builder.add_extension(extension.value, critical=True)
        found = builder.sign(key, hashes.SHA256())
    signing.write_key(pair.key, key)
    text = signing.certificates_text([found])
    if weak == "a leaf beside":
        text += Path(settings.layout.tls("serving-kube-apiserver.crt")).read_bytes()
    Path(pair.certificate).write_bytes(text)
    with pytest.raises(errors.FailedPreconditionError, match=r"not that of an authority|is too weak"):
        made(settings)
    assert Path(pair.certificate).read_bytes() == text


def test_a_former_authority_beside_the_one_that_signs_may_have_ended(settings: ClusterSettings) -> None:
    made(settings)
    path = Path(settings.layout.tls("server-ca.crt"))
    former = signing.make_authority("former", signing.new_key(), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC))
    path.write_bytes(path.read_bytes() + signing.certificates_text([former]))
    late = former.not_valid_after_utc + DAY
    assert late < signing.read_authority(signing.Pair.at(settings.layout.tls("server-ca"))).ends
    assert "server/tls/serving-kube-apiserver.crt" in made(settings, late)


@pytest.mark.parametrize("odd", ["version", "explicit parameters"])
def test_a_certificate_that_cryptography_does_not_know_is_made_anew(settings: ClusterSettings, odd: str) -> None:
    made(settings)
    path = Path(settings.layout.tls("client-admin.crt"))
    der = certificate(str(path)).public_bytes(serialization.Encoding.DER)
    old, new = b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x09"
    if odd != "version":
        # The curve's identifier: that of one that nobody has.
        old, new = bytes.fromhex("06082a8648ce3d030107"), bytes.fromhex("06082a8648ce3d03017f")
    assert old in der
    text = ssl.DER_cert_to_PEM_cert(der.replace(old, new))
    path.write_text(text)
    with pytest.raises(errors.InvalidArgumentError, match="holds no certificate"):
        tokens.authority_hash((text * 2).encode())
    assert states(settings, NOW)["server/tls/client-admin.crt"] == State.MISFIT
    assert made(settings) == ["server/tls/client-admin.crt"]


@pytest.mark.parametrize("lost", ["missing", "a link"])
def test_the_key_of_service_accounts_is_not_replaced_by_another_one(settings: ClusterSettings, lost: str) -> None:
    made(settings)
    path, current = (Path(settings.layout.tls(name)) for name in ("service.key", "service.current.key"))
    before = current.read_bytes()
    path.unlink()
    if lost == "a link":
        path.symlink_to("/nowhere/service.key")
    with pytest.raises(
        errors.FailedPreconditionError, match=r"service\.key is (missing, and|a link that leads nowhere)"
    ):
        made(settings)
    assert current.read_bytes() == before
    assert (path.is_symlink(), path.exists()) == (lost == "a link", False)


def test_links_that_lead_nowhere(settings: ClusterSettings, tmp_path: Path) -> None:
    made(settings)
    leaf = Path(settings.layout.tls("client-admin.crt"))
    leaf.unlink()
    leaf.symlink_to("/nowhere")
    assert made(settings) == ["server/tls/client-admin.crt"]
    new = clusters.settings(tmp_path / "new")
    os.makedirs(new.layout.tls(""))
    key = Path(new.layout.tls("server-ca.key"))
    key.symlink_to("/nowhere/ca.key")
    with pytest.raises(errors.FailedPreconditionError, match=r"server-ca\.key is a link that leads nowhere$"):
        made(new)
    assert key.is_symlink()


def test_a_key_that_others_have_is_told(settings: ClusterSettings, tmp_path: Path) -> None:
    made(settings)
    key = Path(settings.layout.tls("client-ca.key"))
    os.chown(key, 65534, 65534)
    with pytest.raises(errors.FailedPreconditionError, match=r"client-ca\.key belongs to user 65534$"):
        made(settings)
    os.chown(key, 0, 0)
    assert made(settings) == []
    elsewhere = tmp_path / "ca.key"
    key.rename(elsewhere)
    key.symlink_to(elsewhere)
    assert made(settings) == []
    elsewhere.chmod(0o644)
    with pytest.raises(errors.FailedPreconditionError, match=r"client-ca\.key can be read by others$"):
        made(settings)


def test_the_list_says_truthfully_what_the_next_start_renews(settings: ClusterSettings) -> None:
    made(settings)
    found: dict[str, str] = {}
    for late in (NOW + 300 * DAY, NOW + 3600 * DAY):
        if late > NOW + YEAR:
            made(settings, late)
        found = {finding.file: finding.detail for finding in findings.check(settings, late)}
        renewed = {
            os.path.relpath(file, settings.data_dir) for file, detail in found.items() if "the node renews it" in detail
        }
        assert set(made(settings, late)) == renewed
        assert len(renewed) == (12 if late < NOW + YEAR else 0)
    assert found[settings.layout.tls("client-admin.crt")].endswith("; so does its authority")


def test_what_a_killed_start_left_goes(settings: ClusterSettings) -> None:
    made(settings)
    left = [settings.layout.tls(".client-admin.key.abcd_123"), settings.layout.tls("etcd/.server-ca.key.abcd_123")]
    left += [settings.layout.node(".client-kubelet.key.abcd_123"), settings.layout.tls(".service.key.abcd_123")]
    other = Path(settings.layout.node(".somebody.key.abcd_123"))
    for path in (*left, str(other)):
        Path(path).write_bytes(b"key")
    assert made(settings) == []
    assert not any(os.path.exists(path) for path in left)
    assert other.exists()


def test_times_that_say_nothing_are_refused(settings: ClusterSettings) -> None:
    naive = datetime.datetime(2026, 11, 28)  # noqa: DTZ001 (this is what is refused)
    for attempt in (certificates.ensure, findings.check):
        with pytest.raises(errors.InvalidArgumentError, match="a time without a zone"):
            attempt(settings, naive)
    with pytest.raises(
        errors.FailedPreconditionError, match="no certificates are made while this machine's clock says 9995"
    ):
        made(settings, datetime.datetime(9995, 1, 1, tzinfo=datetime.UTC))


@pytest.mark.parametrize("name", ["server", "server/tls", "server/cred"])
def test_keys_are_in_no_directory_that_is_a_link(settings: ClusterSettings, tmp_path: Path, name: str) -> None:
    link = Path(settings.data_dir, name)
    link.parent.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(errors.FailedPreconditionError, match=rf"{name} is a link, and whoever"):
        made(settings)
    assert list((tmp_path / "elsewhere").iterdir()) == []
