"""`nixlet token`: what it asks of the API server, what it prints, and what it refuses. The real one answers in system/test_kubeclient.py."""

import base64
import datetime
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixlet.cli import app
from nixlet.cluster import kubeconfigs, tokens
from nixlet.cluster.settings import ClusterSettings
from nixlet.kubeclient import bootstraptokens
from support import apiservers
from support.secretservers import Secrets

FULL = re.compile(r"K10([0-9a-f]{64})::([a-z0-9]{6})\.([a-z0-9]{16})\n")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> ClusterSettings:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _fd: None)
        made = apiservers.made(tmp_path_factory.mktemp("cluster"))
        tokens.keep(made.layout, authority(made))
        return made


def authority(cluster: ClusterSettings) -> bytes:
    return Path(cluster.layout.tls("server-ca.crt")).read_bytes()


def data(secrets: Secrets, identifier: str) -> dict[str, str]:
    secret = secrets.held[f"bootstrap-token-{identifier}"]
    assert (secret["kind"], secret["type"]) == ("Secret", "bootstrap.kubernetes.io/token")
    return secrets.data(f"bootstrap-token-{identifier}")


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


@pytest.fixture
def run(cluster: ClusterSettings, secrets: Secrets, tmp_path: Path) -> Iterator[Callable[..., int]]:
    with apiservers.serving(secrets.answer, apiservers.context(cluster)) as server:
        admin = kubeconfigs.of_server(cluster)[cluster.layout.cred("admin.kubeconfig")]
        path = str(tmp_path / "kubeconfig")
        kubeconfigs.write(path, kubeconfigs.Kubeconfig(server.url(), admin.authority, credentials=admin.credentials))
        yield lambda *arguments: app.run(["token", *arguments, "--kubeconfig", path])


def test_a_token_is_made_listed_and_removed(
    cluster: ClusterSettings, secrets: Secrets, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("create", "--description", "for the\nrack", "--ttl", "1h30m") == 0
    printed = FULL.fullmatch(capsys.readouterr().out)
    assert printed is not None
    hashed, identifier, secret = printed.groups()
    assert hashed == tokens.authority_hash(authority(cluster))
    kept = data(secrets, identifier)
    expires = datetime.datetime.fromisoformat(kept.pop("expiration"))
    left = expires - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(hours=1) < left <= datetime.timedelta(hours=1, minutes=30)
    assert kept == {
        "token-id": identifier,
        "token-secret": secret,
        "description": "for the\nrack",
        "usage-bootstrap-signing": "true",
        "usage-bootstrap-authentication": "true",
        "auth-extra-groups": "system:bootstrappers:nixlet:default-node-token",
    }
    assert run("list") == 0
    table = capsys.readouterr().out
    assert secret not in table
    assert table.splitlines()[0].split() == ["ID", "TTL", "EXPIRES", "USAGES", "DESCRIPTION", "GROUPS"]
    (row,) = table.splitlines()[1:]
    assert row.split()[0] == identifier
    assert "for the rack" in row
    assert run("list", "-o", "json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["id"] == identifier
    assert secret not in str(told)
    assert run("delete", f"{identifier}.{secret}") == 0
    assert capsys.readouterr().out == f"token {identifier} deleted\n"
    assert secrets.held == {}


def test_a_token_that_is_given(secrets: Secrets, run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    given = "abcdef.0123456789abcdef"
    assert (
        run(
            "create",
            given,
            "--ttl",
            "0",
            "--usages",
            "authentication",
            "--groups",
            "system:bootstrappers:a,system:bootstrappers:b",
        )
        == 0
    )
    assert capsys.readouterr().out.endswith(f"::{given}\n")
    kept = data(secrets, "abcdef")
    assert "expiration" not in kept
    assert "usage-bootstrap-signing" not in kept
    assert kept["auth-extra-groups"] == "system:bootstrappers:a,system:bootstrappers:b"
    assert run("create", given) == 125
    assert "the cluster has a token abcdef already" in capsys.readouterr().err
    assert run("delete", "abcdef", "abcdeg") == 125
    shown = capsys.readouterr()
    assert shown.out == "token abcdef deleted\n"
    assert "the cluster has no token abcdeg" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "password"], "TOKEN is no bootstrap token"),
        (["create", "K10" + "0" * 64 + "::abcdef.0123456789abcdef"], "another certificate authority"),
        (["create", "--ttl", "soon"], "--ttl 'soon' is no time"),
        (["create", "--ttl", "999999d999999d"], "is no time that a token could be good for"),
        (["create", "--usages", "cooking"], "a token has no usage 'cooking'"),
        (["create", "--groups", "system:masters"], "can't make a node one of the group 'system:masters'"),
        (["create", "--usages", "signing", "--groups", "system:bootstrappers:a"], "isn't for authentication"),
        (["delete", "K10" + "0" * 64 + "::server:secret"], "this is no bootstrap token"),
    ],
)
def test_what_is_no_token_is_refused(
    secrets: Secrets, run: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) in {2, 125}
    shown = capsys.readouterr()
    assert message in shown.err
    assert "0123456789abcdef" not in shown.err
    assert secrets.held == {}


def test_damaged_secrets_are_no_tokens(
    secrets: Secrets, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"token-id": "abcdef", "token-secret": "0123456789abcdef"}
    for name, change in (
        ("a", {"token-id": ""}),
        ("b", {"token-secret": "short"}),
        ("c", {"expiration": "soon"}),
        ("d", {"expiration": "2026-01-01T00:00:00"}),
        ("abcdef", {}),
    ):
        values = {key: base64.b64encode(value.encode()).decode() for key, value in {**good, **change}.items()}
        kept = {"metadata": {"name": f"bootstrap-token-{name}"}, "type": bootstraptokens.TYPE, "data": values}
        secrets.held[f"bootstrap-token-{name}"] = kept
    secrets.held["e"] = {"metadata": {"name": "bootstrap-token-abcdef"}, "type": "Opaque", "data": {"token-id": "!"}}
    assert run("list", "-o", "json") == 0
    assert [each["id"] for each in json.loads(capsys.readouterr().out)] == ["abcdef"]


def encoded(**values: str) -> dict[str, str]:
    return {key.replace("_", "-"): base64.b64encode(value.encode()).decode() for key, value in values.items()}


def test_what_others_have_written_is_shown_in_utc_and_on_its_line(
    secrets: Secrets, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    secrets.held["bootstrap-token-abcdef"] = {
        "metadata": {"name": "bootstrap-token-abcdef"},
        "type": bootstraptokens.TYPE,
        "data": encoded(
            token_id="abcdef",
            token_secret="0123456789abcdef",
            expiration="2026-01-01T12:00:00+05:00",
            auth_extra_groups="system:bootstrappers:a\nb\x1b[2J",
        ),
    }
    assert run("list") == 0
    (row,) = capsys.readouterr().out.splitlines()[1:]
    assert "2026-01-01T07:00:00Z" in row
    assert "\x1b" not in row
    assert row.endswith("system:bootstrappers:a b [2J")


def test_a_token_that_is_going_is_none(
    secrets: Secrets, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("create") == 0
    capsys.readouterr()
    (secret,) = secrets.held.values()
    secret["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert run("list", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize("expiration", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_a_time_that_no_calendar_has_is_none(
    secrets: Secrets, run: Callable[..., int], capsys: pytest.CaptureFixture[str], expiration: str
) -> None:
    assert run("create") == 0
    capsys.readouterr()
    (secret,) = secrets.held.values()
    secret["data"] |= encoded(expiration=expiration)
    assert run("list", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_token_is_generated_without_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["token", "generate"]) == 0
    made = capsys.readouterr().out
    assert re.fullmatch(r"[a-z0-9]{6}\.[a-z0-9]{16}\n", made)
    assert app.run(["token", "generate"]) == 0
    assert capsys.readouterr().out != made


def test_the_server_s_token_is_rotated(cluster: ClusterSettings, capsys: pytest.CaptureFixture[str]) -> None:
    places = cluster.layout
    before = Path(places.server, "token").read_text().strip()

    def rotate(*arguments: str) -> int:
        return app.run(["token", "rotate", "--data-dir", cluster.data_dir, *arguments])

    assert rotate("--token", "another") == 125
    assert "the server's token is another one" in capsys.readouterr().err
    assert rotate("--token", before) == 0
    new = capsys.readouterr().out.strip()
    assert new != before
    assert [Path(places.server, name).read_text().strip() for name in ("token", "node-token", "agent-token")] == [
        new
    ] * 3
    assert Path(places.server, "token").stat().st_mode & 0o777 == 0o600
    assert tokens.parse(new).authority == tokens.authority_hash(authority(cluster))
    assert rotate("--new-token", new) == 125
    assert "the new token is the one that there is" in capsys.readouterr().err
    assert rotate("--new-token", "chosen by hand") == 125
    assert rotate("--new-token", "chosen-by-hand") == 0
    assert capsys.readouterr().out.strip().endswith("::server:chosen-by-hand")
    assert tokens.keep(places, authority(cluster)).password == "chosen-by-hand"


@pytest.mark.parametrize("verb", [["list"], ["create"], ["delete", "abcdef"], ["rotate"]])
def test_where_there_is_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str]) -> None:
    assert app.run(["token", *verb, "--data-dir", str(tmp_path)]) == 125
    assert "no server was started there yet" in capsys.readouterr().err
