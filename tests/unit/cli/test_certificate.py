"""`nixlet certificate`: what it says of a data directory, what it makes anew, and what it refuses."""

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from nixlet.cli import app
from nixlet.cluster import certificates, joining, kubeconfigs
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import files
from support import clusters

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture(autouse=True)
def _without_syncs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _fd: None)


def server(directory: Path, now: datetime.datetime = NOW) -> ClusterSettings:
    settings = clusters.settings(directory, tls_sans=("api.example.org",))
    certificates.ensure(settings, now)
    return settings


def run(settings: ClusterSettings | Layout, *arguments: str) -> int:
    return app.run(["certificate", *arguments, "--data-dir", settings.data_dir])


def contents(settings: ClusterSettings) -> dict[str, bytes]:
    return {name: found[0] for name, found in clusters.content(Path(settings.data_dir)).items()}


def test_a_server_s_certificates_are_listed_without_its_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = server(tmp_path)
    before = clusters.content(Path(settings.data_dir))
    assert run(settings, "check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["SERVICE", "FILE", "FOR", "ENDS", "LEFT", "STATE"]
    assert len(lines) == 1 + 5 + 12
    (api,) = (line for line in lines if "serving-kube-apiserver" in line)
    end = (NOW + datetime.timedelta(days=365)).strftime("%Y-%m-%d")
    assert api.split() == [
        "api-server",
        "server/tls/serving-kube-apiserver.crt",
        "kube-apiserver",
        end,
        "364",
        "days",
        "valid",
    ]
    assert clusters.content(Path(settings.data_dir)) == before


def test_as_json_it_says_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = server(tmp_path)
    assert run(settings, "check", "--output", "json", "--service", "api-server, kube-proxy", "-s", "kubelet") == 0
    found = {os.path.basename(each["file"]): each for each in json.loads(capsys.readouterr().out)}
    assert set(found) == {
        "client-kube-apiserver.crt",
        "serving-kube-apiserver.crt",
        "client-kube-proxy.crt",
        "client-kubelet.crt",
        "serving-kubelet.crt",
    }
    assert "api.example.org" in found["serving-kube-apiserver.crt"]["names"]
    assert found["client-kubelet.crt"]["groups"] == ["system:nodes"]
    assert datetime.datetime.fromisoformat(found["client-kubelet.crt"]["not_after"]) > NOW


def test_what_ends_soon_is_no_failure_and_what_has_ended_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soon = server(tmp_path / "soon", NOW - 300 * DAY)
    assert run(soon, "check") == 0
    assert "ends soon" in capsys.readouterr().out
    ended = server(tmp_path / "ended", NOW - 400 * DAY)
    assert run(ended, "check", "-s", "admin") == 1
    assert "it has ended on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "state", "detail"),
    [
        ("server/tls/client-admin.crt", None, "missing", ""),
        ("server/tls/client-admin.crt", b"x", "does not fit", "it holds no certificate"),
        ("server/tls/client-admin.key", None, "does not fit", "its key is missing or can't be read"),
        ("server/tls/client-ca.key", None, "does not fit", "is missing"),
    ],
)
def test_what_is_broken_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, state: str, detail: str
) -> None:
    settings = server(tmp_path)
    path = Path(settings.data_dir, name)
    path.unlink() if content is None else path.write_bytes(content)
    assert run(settings, "check", "-o", "json") == 1
    wrong = [each for each in json.loads(capsys.readouterr().out) if each["state"] != "valid"]
    assert [(Path(each["file"]).stem, each["state"]) for each in wrong] == [(path.stem, state)]
    assert detail in wrong[0]["detail"]


def test_an_agent_s_certificates_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = server(tmp_path / "server")
    places = Layout(str(tmp_path / "agent"), "")
    os.makedirs(places.agent)
    node = joining.Node("node-2", ())
    for name in joining.SIGNED_BY:
        joining.store(places, name, joining.answer(settings, name, joining.request(places, name), node, NOW))
    for name in ("client-ca.crt", "server-ca.crt"):
        Path(places.node(name)).write_bytes(Path(settings.layout.node(name)).read_bytes())
    for path, config in kubeconfigs.of_node(places, settings.server_url).items():
        kubeconfigs.write(path, config)
    os.symlink(tmp_path / "agent", tmp_path / "link")
    for each in (places, Layout(str(tmp_path / "link"), "")):
        assert run(each, "check") == 0
        assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 3
    # Another cluster's, perhaps.
    other = server(tmp_path / "other")
    Path(places.node("client-ca.crt")).write_bytes(Path(other.layout.node("client-ca.crt")).read_bytes())
    assert run(places, "check") == 1
    assert capsys.readouterr().out.count("it was signed by another authority than") == 2
    assert run(places, "rotate") == 125
    assert "its certificates are its server's to make\nhint: start the agent anew" in capsys.readouterr().err


def test_a_kubelet_s_own_certificate_in_anybody_s_cluster_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = server(tmp_path / "server", NOW - 300 * DAY)
    places = Layout(str(tmp_path / "agent"), "")
    os.makedirs(places.agent)
    Path(places.node("client-ca.crt")).write_bytes(Path(settings.layout.node("client-ca.crt")).read_bytes())
    there = kubeconfigs.Kubeconfig("https://192.0.2.7:6443", authority_data=b"x")
    kubeconfigs.write(places.node("bootstrap.kubeconfig"), there)

    def listed(code: int) -> list[str]:
        assert run(places, "check") == code
        return capsys.readouterr().out.splitlines()[1:]

    # Nobody has let it in yet; and it has written where its certificate will be.
    pem = places.node("kubelet-client-current.pem")
    own = dataclasses.replace(there, credentials=kubeconfigs.Credentials(pem, pem))
    for _ in range(2):
        authority, kubelet = listed(1)
        assert "client-ca.crt" in authority
        assert kubelet.endswith("missing  the cluster hasn't given the kubelet its certificate yet")
        kubeconfigs.write(places.node("kubelet.kubeconfig"), own)
    parts = [Path(settings.layout.node(f"client-kubelet.{end}")).read_bytes() for end in ("crt", "key")]
    Path(pem).write_bytes(b"".join(parts))
    _, kubelet = listed(0)
    assert kubelet.split()[:3] == ["kubelet", "agent/kubelet-client-current.pem", "system:node:node-1"]
    assert kubelet.endswith("; the kubelet renews it by itself")
    assert run(places, "rotate") == 125
    assert "of a cluster that isn't nixlet's, which makes its certificates" in capsys.readouterr().err
    Path(pem).write_bytes(parts[0])
    assert "its key is missing or can't be read" in listed(1)[1]
    # What it can't read it takes no notice of.
    Path(places.node("kubelet.kubeconfig")).write_text("")
    assert len(listed(1)) == 2


def test_no_service_is_not_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = server(tmp_path)
    before = contents(settings)
    for nothing in ("", ",", "admin,"):
        assert run(settings, "rotate", "--service", nothing) == 2
        assert "no certificates belong to a service ''" in capsys.readouterr().err
    assert contents(settings) == before


def test_rotation_keeps_what_certificates_say_and_gives_them_new_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = server(tmp_path, NOW - 300 * DAY)
    before = contents(settings)
    assert run(settings, "rotate", "--service", "api-server") == 0
    shown = capsys.readouterr()
    assert [os.path.basename(line) for line in shown.out.splitlines()] == [
        "client-kube-apiserver.crt",
        "serving-kube-apiserver.crt",
    ]
    assert shown.err == "2 certificates are new; the server does not run: its next start uses them\n"
    after = contents(settings)
    changed = {os.path.basename(name) for name in after if after[name] != before[name]}
    assert changed == {f"{who}-kube-apiserver.{end}" for who in ("client", "serving") for end in ("crt", "key")}
    assert Path(settings.layout.tls("serving-kube-apiserver.key")).stat().st_mode & 0o777 == 0o600
    old, new = (
        x509.load_pem_x509_certificate(found["server/tls/serving-kube-apiserver.crt"]) for found in (before, after)
    )
    assert old.subject == new.subject
    assert (
        old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        == new.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    )
    assert new.not_valid_after_utc > NOW + 364 * DAY
    # And the next start has nothing to find fault with.
    assert {os.path.basename(each.file) for each in certificates.ensure(settings, NOW)}.isdisjoint(changed)


def test_all_are_rotated_beside_a_running_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = server(tmp_path)
    with files.exclusive_lock(os.path.join(settings.data_dir, "nixlet.lock"), what="it"):
        assert run(settings, "rotate", "-o", "json") == 0
        shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert (len(told["rotated"]), told["left"], told["restart"]) == (12, [], True)
    assert "what runs takes them up within minutes; restart the server to have" in shown.err
    assert run(settings, "check") == 0


def test_what_is_missing_is_left_to_the_next_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = server(tmp_path)
    path = Path(settings.layout.tls("client-admin.crt"))
    path.unlink()
    assert run(settings, "rotate", "-s", "admin,scheduler") == 0
    shown = capsys.readouterr()
    assert [os.path.basename(line) for line in shown.out.splitlines()] == ["client-scheduler.crt"]
    assert f"warning: {path} is missing or can't be read: the server's next start makes it\n" in shown.err
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.chmod(path, 0o640), "can be read by others"),
        (lambda path: os.chown(path, 12345, -1), "belongs to user 12345"),
        (lambda path: os.truncate(path, 0), "holds no private key"),
    ],
)
def test_an_authority_s_key_that_isn_t_its_owner_s_alone_signs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, message: str
) -> None:
    settings = server(tmp_path)
    assert callable(change)
    change(settings.layout.tls("client-ca.key"))
    before = contents(settings)
    assert run(settings, "rotate") == 125
    assert message in capsys.readouterr().err
    assert contents(settings) == before


@pytest.mark.parametrize("verb", ["check", "rotate"])
def test_where_there_is_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert run(Layout(str(tmp_path / "none"), ""), verb) == 125
    assert "no node of a cluster was started there yet" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["check", "rotate"])
def test_a_service_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert run(server(tmp_path), verb, "--service", "admin,k3s-server") == 2
    assert "no certificates belong to a service 'k3s-server'\nhint: there are admin, " in capsys.readouterr().err


@contextlib.contextmanager
def somebody_else(directory: Path) -> Iterator[None]:
    """Have us be who may not look into a directory."""
    root = os.geteuid() == 0
    directory.chmod(0o700 if root else 0)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        directory.chmod(0o700)


@pytest.mark.parametrize("verb", ["check", "rotate"])
def test_who_may_not_look_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    settings = server(tmp_path)
    with somebody_else(tmp_path):
        assert run(settings, verb) == 125
    told = capsys.readouterr().err
    assert f"{settings.data_dir} can't be looked into: Permission denied" in told
    assert "run it as root" in told
