"""registries.yaml: what it may say, and what is said of mistakes in it."""

from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containerd.registries import Auth, HostConfig, Registries, Tls
from nixlet.node.children import registries
from nixlet.node.settings import config, registries_file

SOURCE = "/etc/nixlet/registries.yaml"

WHOLE = b"""
mirrors:
  docker.io:
    endpoint: ["https://mirror.example.com"]
    rewrite:
      "^library/(.*)": "proj/$1"
  "*":
    endpoint:
    - http://192.0.2.1:5000
configs:
  mirror.example.com:
    auth: {username: ada, password: secret}
    tls:
      ca_file: /ca.crt
      cert_file: /c.crt
      key_file: /c.key
      insecure_skip_verify: true
  "other.example.com:5000":
    auth: {auth: "YWRhOnNlY3JldA==", identity_token: t}
"""


def test_all_that_it_may_say() -> None:
    said = registries_file.parse(WHOLE, SOURCE)
    mirror = said.mirrors["docker.io"]
    assert mirror.endpoints == ("https://mirror.example.com",)
    assert mirror.rewrites[0].apply("library/busybox") == "proj/busybox"
    assert said.mirrors["*"].endpoints == ("http://192.0.2.1:5000",)
    assert said.configs == {
        "mirror.example.com": HostConfig(Auth("ada", "secret"), Tls("/ca.crt", "/c.crt", "/c.key", skip_verify=True)),
        "other.example.com:5000": HostConfig(Auth(auth="YWRhOnNlY3JldA==", identity_token="t")),
    }


@pytest.mark.parametrize("text", ["", "mirrors:\n", "mirrors: {docker.io: }\n", "configs: {x: {auth: , tls: }}\n"])
def test_little_is_said(text: str) -> None:
    said = registries_file.parse(text.encode(), SOURCE)
    assert not any(mirror.endpoints for mirror in said.mirrors.values())
    assert said.auths() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mirrors: [a]\n", ", line 1: mirrors must be a mapping"),
        ("mirrors:\n  docker.io:\n    endpoint: x\n", ", line 3: mirrors.docker.io.endpoint must be a list"),
        ("mirrors:\n  *:\n", ", line 2, column"),
        (
            "configs:\n  x:\n    tls: {insecure_skip_verify: maybe}\n",
            ", line 3: configs.x.tls.insecure_skip_verify must",
        ),
        ("configs:\n  x:\n    auth: {password: [a]}\n", ", line 3: configs.x.auth.password must be a string"),
        ("a: [\n", ", line 2, column 1: this is no YAML"),
        ("mirrors:\n---\nmirrors:\n", " has more than one document"),
    ],
)
def test_mistakes_are_named_with_their_line(text: str, message: str) -> None:
    with pytest.raises(errors.UsageError) as raised:
        registries_file.parse(text.encode(), SOURCE)
    assert str(raised.value).startswith(SOURCE)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mirror:\n  docker.io:\n", ', line 1: mirror is passed over: it is not a known key (did you mean "mirrors"?)'),
        ("mirrors:\n  a:\n    endpoints: [x]\n", ", line 3: mirrors.a.endpoints is passed over: it is not a known key"),
        ("configs:\n  x:\n    auth:\n      passwort: a\n", ", line 4: configs.x.auth.passwort is passed over"),
        ("configs:\n  x:\n    tls:\n      insecure: a\n", ", line 4: configs.x.tls.insecure is passed over"),
        (
            "mirrors:\n  'https://a:hush@b': {endpoint: 1}\n",
            ", line 2: https://...@b is passed over: a registry is named by",
        ),
        ("auths:\n  x: {username: a}\n", ", line 1: auths is passed over: credentials are the auth of a host"),
        ("mirrors:\n  a:\n    rewrite:\n      '(': b\n      c: d\n", ", line 4: mirrors.a.rewrite.( is passed over"),
    ],
)
def test_what_k3s_passes_over_is_passed_over_with_its_line(text: str, message: str) -> None:
    said = registries_file.parse(text.encode(), SOURCE)
    (warning,) = said.warnings
    assert warning.startswith(f"{SOURCE}{message}")
    assert [rewrite.apply("c") for mirror in said.mirrors.values() for rewrite in mirror.rewrites] == ["d"] * (
        "rewrite" in text
    )


@pytest.mark.parametrize(
    ("written", "text"),
    [
        *[
            (each, each)
            for each in ("1234", "0123", "1e3", "0x1F", "yes", "No", "true", "2001-01-01", "22:22", "1_000")
        ],
        ("'007'", "007"),
        ("~", ""),
    ],
)
def test_a_text_is_what_is_written(written: str, text: str) -> None:
    said = registries_file.parse(f"configs: {{x: {{auth: {{username: a, password: {written}}}}}}}\n".encode(), SOURCE)
    assert said.configs["x"].auth == Auth("a", text)


@pytest.mark.parametrize(
    ("written", "value"), [("yes", True), ("On", True), ("TRUE", True), ("y", True), ("no", False), ("off", False)]
)
def test_truth_values_are_those_of_yaml_1_1(written: str, value: bool) -> None:
    said = registries_file.parse(f"configs: {{x: {{tls: {{insecure_skip_verify: {written}}}}}}}\n".encode(), SOURCE)
    assert said.configs["x"].tls == Tls(skip_verify=value)


def test_a_missing_file_says_nothing(tmp_path: Path) -> None:
    assert registries_file.read(f"{tmp_path}/none") == Registries()


def test_a_file_that_others_can_write_is_not_obeyed(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("mirrors: {}\n")
    (tmp_path / "r.yaml").chmod(0o666)
    with pytest.raises(errors.PermissionDeniedError):
        registries_file.read(f"{tmp_path}/r.yaml")


class Files:
    """A node's file and the directory that containerd reads."""

    def __init__(self, directory: Path) -> None:
        self.layout = config.Layout(f"{directory}/data", f"{directory}/state")
        self.settings = config.Settings(private_registry=f"{directory}/registries.yaml")
        self.certs = Path(self.layout.certs_dir)

    def say(self, text: str) -> None:
        Path(self.settings.private_registry).write_text(text)

    def hosts(self) -> dict[str, str]:
        return {path.parent.name: path.read_text() for path in self.certs.glob("*/hosts.toml")}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def test_files_are_there_for_containerd(files: Files) -> None:
    files.say('mirrors: {docker.io: {endpoint: ["http://a.example"]}}\n')
    async with registries.kept(files.settings, files.layout):
        assert list(files.hosts()) == ["docker.io"]
        assert (files.certs / "docker.io").stat().st_mode & 0o777 == 0o700


async def test_what_was_said_before_is_gone_and_what_others_put_there_stays(files: Files) -> None:
    own = files.certs / "own.example.com"
    own.mkdir(parents=True)
    (own / "hosts.toml").write_text('server = "https://own.example.com"\n')
    files.say('mirrors: {docker.io: {endpoint: ["http://a.example"]}}\n')
    async with registries.kept(files.settings, files.layout):
        pass
    files.say('mirrors: {quay.io: {endpoint: ["http://a.example"]}}\n')
    async with registries.kept(files.settings, files.layout):
        assert set(files.hosts()) == {"own.example.com", "quay.io"}
        assert not (files.certs / "docker.io").exists()


async def test_a_persons_own_file_gives_way_and_is_kept(files: Files) -> None:
    own = files.certs / "docker.io"
    own.mkdir(parents=True)
    (own / "hosts.toml").write_text("# mine\n")
    (own / "ca.crt").write_text("x")
    files.say('mirrors: {docker.io: {endpoint: ["http://a.example"]}}\n')
    async with registries.kept(files.settings, files.layout):
        assert "a.example" in files.hosts()["docker.io"]
        assert (own / "hosts.toml.saved").read_text() == "# mine\n"
        assert (own / "ca.crt").exists()
        (own / "hosts.toml").write_text("# mine as well\n")
    async with registries.kept(files.settings, files.layout):
        assert "a.example" in files.hosts()["docker.io"]
    assert (own / "hosts.toml.saved").read_text() == "# mine\n"
    assert (own / "hosts.toml.saved.2").read_text() == "# mine as well\n"


async def test_a_change_that_fails_is_tried_again_and_changes_nothing(
    files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, on command: what was there holds whole, also at the relay, until there is room."""
    rewritten = 'mirrors: {{docker.io: {{endpoint: ["http://a.example"], rewrite: {{"^{}/": ""}}}}}}\n'
    files.say(rewritten.format("x"))
    async with registries.kept(files.settings, files.layout) as kept:
        before, said = files.hosts(), kept.said
        relay = kept._relay
        assert relay is not None
        served = dict(relay._endpoints)
        files.say('mirrors: {docker.io: {endpoint: ["http://b.example"]}}\n')
        with monkeypatch.context() as full:

            def write(path: str, *_: object, **__: object) -> None:
                raise errors.ResourceExhaustedError(f"{path} can't be written: No space left on device")

            full.setattr("nixlet.host.files.write_atomically", write)
            for _ in range(3):
                await kept.try_again()
        assert (files.hosts(), kept.said) == (before, said)
        assert served.items() <= relay._endpoints.items()
        assert "No space left" in kept.problem
        assert [record.levelname for record in caplog.records].count("ERROR") == 1
        await kept.try_again()
        assert kept.problem == ""
        assert "b.example" in files.hosts()["docker.io"]
        assert not served.keys() & relay._endpoints.keys()


async def test_credentials_stand_in_containerds_configuration_alone(files: Files) -> None:
    files.say("configs: {r.example: {auth: {username: ada, password: secret}}}\n")
    async with registries.kept(files.settings, files.layout) as kept:
        assert kept.auths == {"r.example": {"username": "ada", "password": "secret"}}
        assert "secret" not in str(files.hosts())


async def test_a_file_that_comes_while_containerd_looks_elsewhere_is_said(files: Files) -> None:
    async with registries.kept(files.settings, files.layout) as kept:
        kept.elsewhere = "/etc/containerd/certs.d"
        await kept.try_again()
        assert kept.problem == ""
        files.say('mirrors: {docker.io: {endpoint: ["http://a.example"]}}\n')
        await kept.try_again()
        assert "is not obeyed while containerd's configuration has registry.config_path = '/etc" in kept.problem
        kept.elsewhere = ""
        await kept.try_again()
        assert "has no registry.config_path" in kept.problem
        assert files.hosts() == {}
