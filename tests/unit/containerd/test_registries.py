"""From what is said of registries to what containerd is told of each."""

import re
import tomllib
from typing import Any

import pytest

from nixlet.containerd import hosts, registries
from nixlet.containerd.registries import Auth, HostConfig, Mirror, Registries, Tls
from nixlet.containerd.rewrites import Rewrite, compiled

AUTH = HostConfig(auth=Auth("ada", "secret"))
CA = HostConfig(tls=Tls(ca_file="/ca.crt"))
HUB = "https://registry-1.docker.io/v2"


def made(
    mirrors: dict[str, list[str]] | None = None,
    configs: dict[str, HostConfig] | None = None,
    *,
    default_endpoint: bool = True,
    rewrites: tuple[Rewrite, ...] = (),
    told: hosts.Told | None = None,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The hosts.toml files by directory, and what was passed over."""
    warnings: list[str] = []
    said = Registries(
        {host: Mirror(tuple(endpoints), rewrites) for host, endpoints in (mirrors or {}).items()}, configs or {}
    )
    # By themselves the cases are of a containerd that was started with what the file says.
    told = said.auths() if told is None else told
    found = hosts.hosts(said, default_endpoint=default_endpoint, warn=warnings.append, told=told)

    def relayed(endpoint: registries.Endpoint) -> hosts.Way | None:
        way = hosts.Way(f"http://relay/{endpoint.host.strip('[]')}", {"Key": "k"})
        return way if hosts.needs_relay(endpoint, told) else None

    texts = {name: hosts.render(host, relayed) for name, host in found.items()}
    assert all(text.startswith(hosts.HEADER) for text in texts.values())
    return {name: tomllib.loads(text) for name, text in texts.items()}, warnings


def test_nothing_said_makes_no_files() -> None:
    assert made() == ({}, [])


@pytest.mark.parametrize(
    "registry", ["docker.io", "registry.example.com", "localhost", "127.0.0.1:443", "localhost:80"]
)
def test_a_mirror_without_endpoints_changes_nothing(registry: str) -> None:
    assert made({registry: []}) == ({}, [])
    assert made({registry: []}, default_endpoint=False) == ({}, [])


def test_every_registrys_mirror_without_endpoints_changes_nothing() -> None:
    assert made({"*": []}) == ({}, [])


def test_docker_hub_as_its_own_mirror_changes_nothing() -> None:
    assert made({"docker.io": ["https://registry-1.docker.io/v2"]}) == ({}, [])
    assert made({"docker.io": ["docker.io"]}) == ({}, [])


def test_a_mirror_is_asked_before_the_registry() -> None:
    (files, _) = made({"docker.io": ["https://mirror.example.com"]})
    assert files == {
        "docker.io": {
            "server": HUB,
            "capabilities": ["pull", "resolve", "push"],
            "host": {"https://mirror.example.com/v2": {"capabilities": ["pull", "resolve"]}},
        }
    }


def test_mirrors_keep_their_order() -> None:
    files, _ = made({"docker.io": ["http://c", "http://a", "http://b"]})
    assert list(files["docker.io"]["host"]) == ["http://c/v2", "http://a/v2", "http://b/v2"]


@pytest.mark.parametrize(
    ("endpoint", "url", "override"),
    [
        ("https://mirror.example.com/v2", "https://mirror.example.com/v2", False),
        ("https://mirror.example.com/", "https://mirror.example.com/v2", False),
        ("https://mirror.example.com", "https://mirror.example.com/v2", False),
        ("https://mirror.example.com/v2/", "https://mirror.example.com/v2", False),
        ("https://mirror.example.com/some/path", "https://mirror.example.com/some/path", True),
        ("mirror.example.com/some/path/v2", "https://mirror.example.com/some/path/v2", True),
        ("mirror.example.com/v2", "https://mirror.example.com/v2", False),
        ("mirror.example.com", "https://mirror.example.com/v2", False),
        ("mirror.example.com:443", "https://mirror.example.com:443/v2", False),
        ("mirror.example.com:5000", "https://mirror.example.com:5000/v2", False),
        ("192.0.2.1", "https://192.0.2.1/v2", False),
        ("192.0.2.1:443", "https://192.0.2.1:443/v2", False),
        ("http://192.0.2.1:5000", "http://192.0.2.1:5000/v2", False),
        ("localhost:5000", "http://localhost:5000/v2", False),
        ("https://localhost:5000", "https://localhost:5000/v2", False),
        ("127.0.0.1:5000", "http://127.0.0.1:5000/v2", False),
        ("https://127.0.0.1:5000", "https://127.0.0.1:5000/v2", False),
        ("[::1]:5000", "http://[::1]:5000/v2", False),
        ("localhost", "https://localhost/v2", False),
        ("localhost:443", "https://localhost:443/v2", False),
        ("docker.io", HUB, False),
    ],
)
def test_endpoints_are_made_whole(endpoint: str, url: str, override: bool) -> None:
    found = registries.normalised(endpoint)
    assert (found.url, found.override_path) == (url, override)


def test_docker_hub_has_one_name() -> None:
    assert registries.normalised("https://registry-1.docker.io").host == "docker.io"
    assert registries.normalised("docker.io").host == "docker.io"


@pytest.mark.parametrize(
    ("endpoint", "why"),
    [
        ("", "it has no host"),
        ("https://", "it has no host"),
        ("ftp://mirror.example.com", "its scheme is ftp"),
        ("https://user:password@mirror.example.com", "https://...@mirror.example.com: credentials can't stand in it"),
        ("user:password@mirror.example.com", "...@mirror.example.com: credentials can't stand in it"),
        ("https://user:pass/word@mirror.example.com", "credentials can't stand in it"),
        ("https://mirror.example.com/v2?key=password", "https://mirror.example.com/v2?...: it must end"),
        ("https://mirror.example.com/v2?x=1", "it must end with the path"),
        ("https://mirror.example.com/#x", "it must end with the path"),
        ("https://mirror.example.com:999999", "Port out of range"),
        ("https://mirror.example.com/a\nb", ""),
        ("https://[::1", "Invalid IPv6"),
        ('https://a"b', "it has no host"),
    ],
)
def test_what_is_no_endpoint_is_passed_over_with_a_word(endpoint: str, why: str) -> None:
    files, (warning,) = made({"docker.io": [endpoint, "https://mirror.example.com"]})
    assert warning.startswith("endpoint 1 of docker.io is passed over")
    assert why in warning
    assert "word" not in warning
    assert list(files["docker.io"]["host"]) == ["https://mirror.example.com/v2"]


@pytest.mark.parametrize(
    "endpoints",
    [
        ["https://a.example", "https://a.example"],
        ["https://a.example", "a.example"],
        ["a.example/v2", "https://a.example/"],
    ],
)
def test_an_endpoint_named_twice_is_asked_once(endpoints: list[str]) -> None:
    files, (warning,) = made({"docker.io": [*endpoints, "https://b.example"]})
    assert "is named before" in warning
    assert list(files["docker.io"]["host"]) == ["https://a.example/v2", "https://b.example/v2"]


@pytest.mark.parametrize("name", ["https://registry.example.com", "registry.example.com/path", "..", "a/../b", ""])
def test_a_registry_is_a_host(name: str) -> None:
    files, warnings = made({name: ["https://mirror.example.com"]}, {name: CA})
    assert files == {}
    assert ["a registry is named by its host" in warning for warning in warnings] == [True]


def test_credentials_alone_make_a_file_without_them() -> None:
    files, _ = made(configs={"registry.example.com": AUTH})
    assert files == {
        "registry.example.com": {
            "server": "https://registry.example.com/v2",
            "capabilities": ["pull", "resolve", "push"],
            "host": {},
        }
    }


def test_a_config_that_says_nothing_makes_no_file() -> None:
    assert made(configs={"registry.example.com": HostConfig()}) == ({}, [])


def test_certificates_of_the_registry_and_of_its_mirror() -> None:
    files, _ = made(
        {"registry.example.com": ["mirror.example.com"]},
        {
            "registry.example.com": CA,
            "mirror.example.com": HostConfig(tls=Tls("/m.crt", "/c.crt", "/c.key", skip_verify=True)),
        },
    )
    assert files["registry.example.com"]["ca"] == ["/ca.crt"]
    assert files["registry.example.com"]["host"]["https://mirror.example.com/v2"] == {
        "capabilities": ["pull", "resolve"],
        "ca": ["/m.crt"],
        "client": [["/c.crt", "/c.key"]],
        "skip_verify": True,
    }
    assert files["mirror.example.com"]["server"] == "https://mirror.example.com/v2"


def test_a_path_of_its_own_is_the_whole_path() -> None:
    files, _ = made({"docker.io": ["mirror.example.com/docker/v2"]})
    assert files["docker.io"]["host"]["https://mirror.example.com/docker/v2"]["override_path"] is True


def test_the_registry_as_its_own_last_mirror_is_the_server() -> None:
    files, _ = made({"docker.io": ["https://mirror.example.com", "docker.io"]})
    assert files["docker.io"]["server"] == HUB
    assert list(files["docker.io"]["host"]) == ["https://mirror.example.com/v2"]


def test_the_registry_as_its_own_first_mirror_is_asked_first() -> None:
    files, _ = made({"docker.io": ["docker.io", "https://mirror.example.com"]})
    assert list(files["docker.io"]["host"]) == [HUB, "https://mirror.example.com/v2"]


def test_without_the_default_endpoint_the_last_mirror_is_the_server() -> None:
    files, _ = made({"docker.io": ["http://a.example", "b.example/path"]}, {"b.example": CA}, default_endpoint=False)
    assert files["docker.io"] == {
        "server": "https://b.example/path",
        "capabilities": ["pull", "resolve"],
        "override_path": True,
        "ca": ["/ca.crt"],
        "host": {"http://a.example/v2": {"capabilities": ["pull", "resolve"]}},
    }


def test_without_the_default_endpoint_it_can_be_named() -> None:
    files, _ = made({"docker.io": ["http://a.example", "docker.io"]}, default_endpoint=False)
    assert files["docker.io"]["server"] == HUB


def test_without_the_default_endpoint_a_registry_without_mirrors_keeps_its_certificates() -> None:
    files, _ = made({"registry.example.com": []}, {"registry.example.com": CA}, default_endpoint=False)
    assert files["registry.example.com"]["server"] == "https://registry.example.com/v2"
    assert files["registry.example.com"]["ca"] == ["/ca.crt"]


def test_without_the_default_endpoint_a_registry_with_a_config_is_asked_as_k3s_does() -> None:
    files, _ = made({"r.example": ["http://a.example"]}, {"r.example": CA}, default_endpoint=False)
    assert files["r.example"]["server"] == "https://r.example/v2"
    assert list(files["r.example"]["host"]) == ["http://a.example/v2"]


RELAYED = {"server": "http://relay/r.example", "capabilities": ["pull", "resolve", "push"], "override_path": True}


@pytest.mark.parametrize(
    ("configs", "told"),
    [
        ({}, {"r.example": {"username": "ada"}}),
        ({"r.example": HostConfig()}, {"r.example": {"username": "ada"}}),
        ({"r.example": AUTH}, {}),
        ({"r.example": AUTH}, {"r.example": {"username": "ada", "password": "another"}}),
    ],
)
def test_credentials_that_hold_no_more_are_taken_from_containerd(
    configs: dict[str, HostConfig], told: hosts.Told
) -> None:
    """It can't be told to forget them: the registry is asked by the relay."""
    files, _ = made(configs=configs, told=told)
    assert files == {"r.example": {**RELAYED, "header": {"Key": "k"}, "host": {}}}


def test_a_registry_that_has_lost_its_credentials_keeps_every_registrys_mirror() -> None:
    files, _ = made({"*": ["http://a.example"]}, told={"r.example": {"username": "ada"}}, default_endpoint=False)
    assert files["r.example"]["server"] == "http://a.example/v2"
    files, _ = made({"*": ["http://a.example"]}, told={"r.example": {"username": "ada"}})
    assert list(files["r.example"]["host"]) == ["http://a.example/v2"]
    assert files["r.example"]["server"] == "http://relay/r.example"


def test_docker_hub_loses_its_credentials_by_both_names() -> None:
    files, _ = made(told=Registries(configs={"docker.io": AUTH}).auths())
    assert set(files) == {"docker.io", "registry-1.docker.io"}


def test_addresses_of_ipv6_are_no_keys_that_containerd_1_could_not_read() -> None:
    files, _ = made({"r.example": ["http://[2001:db8::1]"]}, {"[2001:db8::1]": AUTH})
    assert Registries(configs={"[2001:db8::1]": AUTH}).auths() == {}
    assert list(files["r.example"]["host"]) == ["http://relay/2001:db8::1"]


def test_every_other_registry() -> None:
    files, _ = made({"*": ["https://mirror.example.com"]})
    # containerd puts the registry itself where no server is named.
    assert files == {"_default": {"host": {"https://mirror.example.com/v2": {"capabilities": ["pull", "resolve"]}}}}
    files, _ = made({"*": ["https://mirror.example.com"]}, default_endpoint=False)
    assert files["_default"]["server"] == "https://mirror.example.com/v2"


def test_certificates_of_every_other_registry() -> None:
    files, _ = made(configs={"*": HostConfig(tls=Tls(skip_verify=True))})
    assert files == {"_default": {"skip_verify": True, "host": {}}}


def test_credentials_are_sent_to_nobody_who_is_not_named() -> None:
    files, (warning,) = made(configs={"*": AUTH})
    assert 'credentials for "*" are not used' in warning
    assert Registries(configs={"*": AUTH}).auths() == {}
    assert "secret" not in str(files)


def test_an_endpoint_with_rewrites_is_asked_by_the_relay() -> None:
    rewrite = Rewrite(re.compile("^library/(.*)"), "proj/$1")
    files, _ = made({"docker.io": ["mirror.example.com"]}, {"mirror.example.com": CA}, rewrites=(rewrite,))
    assert files["docker.io"]["server"] == HUB
    # The relay is told of the certificates; containerd needs none for it.
    assert files["docker.io"]["host"] == {
        "http://relay/mirror.example.com": {
            "capabilities": ["pull", "resolve"],
            "override_path": True,
            "header": {"Key": "k"},
        }
    }


@pytest.mark.parametrize(
    ("pattern", "replacement", "repository", "becomes"),
    [
        ("^library/(.*)", "proj/mirrored-$1", "library/busybox", "proj/mirrored-busybox"),
        ("^library/(.*)", "proj/$1", "other/busybox", "other/busybox"),
        ("(.*)", "proj/$1", "a/b", "proj/a/b"),
        ("x*", "-", "axb", "-a-b-"),
        ("^(?P<org>[^/]+)/(.*)$", "${org}-mirror/$2", "a/b", "a-mirror/b"),
        ("^(.*)$", "$1x/y", "a", "/y"),
        ("^(.*)$", "${1}x", "a", "ax"),
        ("^a$", "$$1", "a", "$1"),
        ("^a(b)?c$", "x${1}y", "ac", "xy"),
        ("a", "b", "aXa", "bXb"),
        ("^(.*)$", "$7", "a", ""),
        ("^[[:alpha:]]+/", "x/", "abc/d", "x/d"),
        ("^[^[:digit:]_]+", "x", "ab1", "x1"),
        ("^(?<org>[a-z]+)/", "${org}s/", "team/app", "teams/app"),
        (r"app\z", "x", "app/app", "app/x"),
        ("^([a-z*+]+)/", "x-$1/", "team/app", "x-team/app"),
        ("[]a[&|-]+", "x", "b[]&|a-b", "bxb"),
        ("^te(?i)AM/", "x/", "team/app", "x/app"),
        ("^te(?i)X|AM|Z", "x", "team", "tex"),
        ("(t(?i)E)(A|M)", "x", "team", "team"),
        ("(?i:T)eam(?-i)", "x", "team", "x"),
        (r"\x{74}e[\x{61}-\x{62}]", "x", "team", "xm"),
        ("(?U)^(.+)/(.+?)$", "$2", "a/b/c", "b/c"),
        ("(?P<org>[a-z]+)/", "${org}s/", "team/app", "teams/app"),
        ("a{2}/|^x{,2}", "y", "aa/x", "yx"),
    ],
)
def test_rewrites_replace_as_gos_do(pattern: str, replacement: str, repository: str, becomes: str) -> None:
    assert Rewrite(compiled(pattern), replacement).apply(repository) == becomes


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "a**",
        "(?=a)",
        "(?<!a)b",
        r"(a)\1",
        "(?>a)",
        "a++",
        r"\pL",
        r"\Qa\E",
        "[[:letter:]]",
        r"a\Z",
        "a*?+",
        "(?)",
        r"[\pL]",
    ],
)
def test_what_is_no_pattern_of_gos(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        compiled(pattern)


def test_docker_hubs_credentials_go_by_both_of_its_names() -> None:
    for name in ("docker.io", "registry-1.docker.io"):
        found = Registries(configs={name: AUTH})
        assert set(found.auths()) == {"docker.io", "registry-1.docker.io"}
        assert {found.config_for(each) for each in ("docker.io", "registry-1.docker.io")} == {AUTH}
        # containerd was started with these, and asks by itself.
        files, _ = made(configs={name: AUTH}, told=found.auths())
        assert "relay" not in str(files)


def test_credentials_in_one_text() -> None:
    auth = Auth(auth="YWRhOnNlY3JldA==")
    assert auth.login() == ("ada", "secret")
    assert auth.fields() == {"auth": "YWRhOnNlY3JldA=="}
    assert Auth(auth="%%%").login() == ("", "")
    assert Auth(identity_token="x").fields() == {"identitytoken": "x"}


def test_secrets_are_not_shown() -> None:
    assert "secret" not in repr(Auth("ada", "secret", "secret", "secret"))
