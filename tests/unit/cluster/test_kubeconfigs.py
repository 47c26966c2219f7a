"""Kubeconfig files."""

import base64
import grp
import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.cluster import certificates, kubeconfigs
from nixlet.cluster.kubeconfigs import Credentials, Kubeconfig
from support import clusters

WHOLE = Kubeconfig(
    "https://192.0.2.7:6443",
    authority_data=b"authority",
    credentials=Credentials(certificate_data=b"certificate", key_data=b"key"),
)


def test_the_text_is_what_people_know() -> None:
    assert (
        WHOLE.rendered()
        == """\
apiVersion: v1
kind: Config
clusters:
  - name: default
    cluster:
      certificate-authority-data: YXV0aG9yaXR5
      server: https://192.0.2.7:6443
users:
  - name: default
    user:
      client-certificate-data: Y2VydGlmaWNhdGU=
      client-key-data: a2V5
contexts:
  - name: default
    context:
      cluster: default
      user: default
current-context: default
"""
    )
    assert "key" not in repr(WHOLE.credentials).replace("key=", "").replace("key_data=", "")


@pytest.mark.parametrize(
    "config",
    [
        WHOLE,
        Kubeconfig("https://[2001:db8::1]:6443", "/a/ca.crt", credentials=Credentials("/a/b.crt", "/a/b.key")),
        # A token that YAML would take for a number, and names that it would take for something else.
        Kubeconfig("https://x", "/ca", credentials=Credentials(token="12e3"), cluster="y", user="null", context="0o7"),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, config: Kubeconfig) -> None:
    path = tmp_path / "made/kubeconfig"
    kubeconfigs.write(str(path), config)
    assert kubeconfigs.read(str(path)) == config


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_mode_and_group(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "kubeconfig"
    group = grp.getgrgid(os.getegid())
    before = os.umask(umask)
    try:
        kubeconfigs.write(str(path), WHOLE)
        assert path.stat().st_mode & 0o777 == 0o600
        first = path.stat().st_ino
        kubeconfigs.write(str(path), WHOLE)
        assert path.stat().st_ino == first
        kubeconfigs.write(str(path), WHOLE, mode=kubeconfigs.mode("0640"), group=kubeconfigs.group(group.gr_name))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert path.stat().st_gid == group.gr_gid


def test_another_group_and_back(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    for number in (12345, 0):
        kubeconfigs.write(str(path), WHOLE, mode=0o640, group=kubeconfigs.group(str(number)))
        assert (path.stat().st_gid, path.stat().st_mode & 0o7777) == (number, 0o640)


def test_modes_and_groups_of_people() -> None:
    assert [kubeconfigs.mode(text) for text in ("600", "0644", "0o640")] == [0o600, 0o644, 0o640]
    for text in ("", "6", "rw", "0x1ff", "999", "-600", "64400", "o640", "0o", "\u0666\u0660\u0660"):
        with pytest.raises(errors.InvalidArgumentError, match="is no mode"):
            kubeconfigs.mode(text)
    with pytest.raises(errors.InvalidArgumentError, match="666 lets everybody write"):
        kubeconfigs.mode("666")
    with pytest.raises(errors.InvalidArgumentError, match="044 lets its owner not read"):
        kubeconfigs.mode("044")
    assert kubeconfigs.group("") == -1
    assert kubeconfigs.group("0") == kubeconfigs.group("root") == 0
    for text in ("4294967295", "99999999999", "9" * 5000):
        with pytest.raises(errors.InvalidArgumentError, match="is no group's number"):
            kubeconfigs.group(text)
    with pytest.raises(errors.NotFoundError, match="this machine has no group 'no-such-group'"):
        kubeconfigs.group("no-such-group")


def test_a_server_s_programs_have_theirs(tmp_path: Path) -> None:
    settings = clusters.settings(tmp_path)
    certificates.ensure(settings, clusters.NOW)
    found = {**kubeconfigs.of_server(settings), **kubeconfigs.of_node(settings.layout, settings.server_url)}
    assert [os.path.relpath(path, settings.data_dir) for path in found] == [
        "server/cred/admin.kubeconfig", "server/cred/controller.kubeconfig", "server/cred/scheduler.kubeconfig",
        "agent/kubelet.kubeconfig", "agent/kubeproxy.kubeconfig",
    ]  # fmt: skip
    for config in found.values():
        assert config.server == "https://192.0.2.7:6443"
        for path in (config.authority, config.credentials.certificate, config.credentials.key):
            assert os.path.isfile(path)
    people = kubeconfigs.for_people(settings)
    assert people.credentials.key_data == Path(settings.layout.tls("client-admin.key")).read_bytes()
    assert people.authority_data == Path(settings.layout.tls("server-ca.crt")).read_bytes()
    assert people.server == settings.server_url


FOREIGN = f"""
apiVersion: v1
kind: Config
preferences: {{colors: true}}
extensions: []
clusters:
- cluster: {{server: "https://one:6443", certificate-authority: pki/ca.crt}}
  name: one
- {{name: two, cluster: {{server: "https://two", certificate-authority-data: {base64.b64encode(b"ca").decode()}}}}}
- {{name: plain, cluster: {{server: "http://two"}}}}
- {{name: careless, cluster: {{server: "https://two", insecure-skip-tls-verify: true}}}}
- {{name: torn, cluster: {{server: "https://two", certificate-authority-data: "!"}}}}
contexts:
- {{name: first, context: {{cluster: one, user: file, namespace: x}}}}
- {{name: second, context: {{cluster: two, user: bearer}}}}
- {{name: nobody, context: {{cluster: two}}}}
- {{name: plain, context: {{cluster: plain, user: file}}}}
- {{name: careless, context: {{cluster: careless}}}}
- {{name: torn, context: {{cluster: torn}}}}
- {{name: lost, context: {{cluster: gone}}}}
- {{name: plugin, context: {{cluster: one, user: plugin}}}}
- {{name: half, context: {{cluster: one, user: half}}}}
- {{name: stranger, context: {{cluster: one, user: stranger}}}}
current-context: second
users:
- {{name: file, user: {{client-certificate: a.crt, client-key: /etc/a.key}}}}
- {{name: bearer, user: {{tokenFile: token}}}}
- {{name: plugin, user: {{exec: {{command: aws}}}}}}
- {{name: half, user: {{client-certificate: a.crt}}}}
"""


def test_a_foreign_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(FOREIGN)
    (tmp_path / "token").write_text("word\n")
    read = kubeconfigs.read
    assert read(str(path)) == Kubeconfig("https://two", "", b"ca", Credentials(token="word"), "two", "bearer", "second")
    credentials = Credentials(f"{tmp_path}/a.crt", "/etc/a.key")
    first = Kubeconfig("https://one:6443", f"{tmp_path}/pki/ca.crt", b"", credentials, "one", "file", "first")
    assert read(str(path), "first") == first
    assert read(str(path), "nobody").credentials == Credentials()


@pytest.mark.parametrize(
    ("context", "kind", "message"),
    [
        ("plain", errors.UsageError, r"line \d+: clusters\[2\]\.cluster\.server must begin with https://"),
        ("careless", errors.UnsupportedError, "says not to verify the server, and then it may be anybody"),
        ("torn", errors.UsageError, r"line \d+: clusters\[4\]\.cluster\.certificate-authority-data is no base64"),
        ("lost", errors.UsageError, "has no cluster gone"),
        ("plugin", errors.UnsupportedError, r"^user plugin in \S+ is known by exec, which is not supported$"),
        ("half", errors.UsageError, "client-certificate has no client-key beside it"),
        ("stranger", errors.UsageError, "has no user stranger"),
        ("none", errors.UsageError, "has no context none"),
    ],
)
def test_what_can_not_be_used_is_told(tmp_path: Path, context: str, kind: type[Exception], message: str) -> None:
    path = tmp_path / "config"
    path.write_text(FOREIGN)
    with pytest.raises(kind, match=message):
        kubeconfigs.read(str(path), context)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it has 0 documents"),
        ("kind: Pod", "line 1: kind is not Config"),
        ("[]", "must be a mapping"),
        ("kind: Config", "has no current-context"),
        ("{", "config"),
    ],
)
def test_what_is_no_such_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(errors.UsageError, match=message):
        kubeconfigs.read(str(path))
    path.unlink()
    with pytest.raises(errors.FailedPreconditionError, match=r"No such file or directory$"):
        kubeconfigs.read(str(path))


def asked(
    tmp_path: Path, *, user: str = "token: abc", cluster: str = "", server: str = "https://x", more: str = ""
) -> Kubeconfig:
    """What is read of a file with these lines."""
    path = tmp_path / "asked"
    path.write_text(
        f"""
kind: Config
current-context: c
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
clusters:
- name: c
  cluster:
    server: "{server}"
    {cluster}
users:
- name: u
  user:
    {user.replace(chr(10), chr(10) + "    ")}
{more}
"""
    )
    return kubeconfigs.read(str(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [("as", "viewer"), ("as-uid", "x"), ("as-groups", "[x]"), ("as-user-extra", "{a: [b]}"), ("exec", "{command: x}")],
)
def test_nobody_speaks_as_somebody_else(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(errors.UnsupportedError, match=f"is known by {key}, which is not supported"):
        asked(tmp_path, user=f"token: abc\n{key}: {value}")


@pytest.mark.parametrize("key", ["proxy-url", "tls-server-name"])
def test_a_server_is_reached_as_the_file_says_or_not_at_all(tmp_path: Path, key: str) -> None:
    with pytest.raises(errors.UnsupportedError, match=f"cluster c in .* has {key}, which is not supported"):
        asked(tmp_path, cluster=f"{key}: x")


@pytest.mark.parametrize(
    "server",
    ["https://", "https://:6443", "https://u:very-secret@h", "https://h\\r\\nx", "https://h:x", "https://h:99999", "https://[::1", "https://h/?a=b", "https://h x"],
)  # fmt: skip
def test_a_server_is_a_url(tmp_path: Path, server: str) -> None:
    assert asked(tmp_path, server="https://[::1]:6443/k8s/x").server == "https://[::1]:6443/k8s/x"
    with pytest.raises(errors.UsageError, match=r"cluster\.server must be a URL") as caught:
        asked(tmp_path, server=server)
    assert "very-secret" not in f"{caught.value} {caught.value.__cause__}"


def test_a_token_is_one_word(tmp_path: Path) -> None:
    assert asked(tmp_path).credentials.token == "abc"
    for token in ("a\\r\\nX-Remote-User: admin", "very secret", "\\xe4"):
        with pytest.raises(errors.UsageError, match=r"user\.token is no token"):
            asked(tmp_path, user=f'token: "{token}"')
    place = tmp_path / "place"
    for content in (b"a\r\nX: y", b"root:x\xff", b"", b"very secret", b"a" * 70000):
        place.write_bytes(content)
        with pytest.raises(errors.UsageError, match=r"place holds no token") as caught:
            asked(tmp_path, user="tokenFile: place")
        assert "secret" not in str(caught.value)
    with pytest.raises(errors.UsageError, match=r"is no regular file$"):
        asked(tmp_path, user="tokenFile: /dev/null")
    # client-go: the file comes first, and what stands beside it is for when it can't be read.
    place.write_text("of-the-file\n")
    assert asked(tmp_path, user="token: abc\ntokenFile: place").credentials.token == "of-the-file"
    assert asked(tmp_path, user="token: abc\ntokenFile: nowhere").credentials.token == "abc"
    with pytest.raises(errors.FailedPreconditionError, match="No such file or directory"):
        asked(tmp_path, user="tokenFile: nowhere")


def test_data_may_be_folded_and_names_are_there_once(tmp_path: Path) -> None:
    folded = "client-certificate-data: |\n  YXV0aG9y\n  aXR5\nclient-key-data: a2V5"
    assert asked(tmp_path, user=folded).credentials.certificate_data == b"authority"
    with pytest.raises(errors.UsageError, match=r"users\[1\]\.name is there twice among users: u"):
        asked(tmp_path, more="- name: u\n  user: {token: other}")
