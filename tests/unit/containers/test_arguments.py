"""What people write behind -p, -v, -e and -u."""

from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containers import arguments, model


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("8080:80", model.Port(80, 8080)),
        ("8080:80/udp", model.Port(80, 8080, "", "UDP")),
        ("127.0.0.1:1:65535/tcp", model.Port(65535, 1, "127.0.0.1")),
        ("[::1]:53:53/udp", model.Port(53, 53, "::1", "UDP")),
        (":8080:80", model.Port(80, 8080)),
    ],
)
def test_ports(text: str, port: model.Port) -> None:
    assert arguments.ports([text]) == (port,)


def test_a_range_of_ports() -> None:
    assert arguments.ports(["127.0.0.1:8000-8002:80-82/udp"]) == tuple(
        model.Port(80 + number, 8000 + number, "127.0.0.1", "UDP") for number in range(3)
    )
    assert arguments.ports(["8000-8000:80"]) == (model.Port(80, 8000),)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("80", "is not [ADDRESS:]HOST:CONTAINER[/udp]"),
        ("", "is not [ADDRESS:]HOST:CONTAINER[/udp]"),
        ("8000-:8000", "is not [ADDRESS:]HOST:CONTAINER[/udp]"),
        ("8000-8010:8000-8009", "the host's range has 11 ports, the container's 10"),
        ("8000-8010:80", "the host's range has 11 ports, the container's 1"),
        ("8010-8000:8010-8000", "a range begins with the lower one"),
        ("80:80-65536", "a port is a number from 1 to 65535"),
        ("::1:80:80", "is not [ADDRESS:]HOST:CONTAINER[/udp]"),
        ("0:80", "a port is a number from 1 to 65535"),
        ("80:65536", "a port is a number from 1 to 65535"),
        ("80:99999999999999999999", "a port is a number from 1 to 65535"),
        ("80:80/icmp", "icmp is none of tcp, udp, sctp"),
        ("localhost:80:80", "'localhost' is no IP address"),
        ("[127.0.0.1]:80:80", "an IPv6 address stands in brackets and has no zone"),
        ("[fe80::1%eth0]:80:80", "an IPv6 address stands in brackets and has no zone"),
    ],
)
def test_what_is_no_port(text: str, problem: str) -> None:
    with pytest.raises(errors.UsageError, match="--publish") as caught:
        arguments.ports([text])
    assert problem in caught.value.message


@pytest.mark.parametrize(
    ("texts", "fits"),
    [
        (["80:80", "80:81"], False),
        (["127.0.0.1:80:80", "80:81"], False),
        (["127.0.0.1:80:80", "127.0.0.2:80:80"], True),
        (["80:80/tcp", "80:80/udp"], True),
        (["80:80", "81:80"], True),
        (["78-80:1-3", "80:80"], False),
    ],
)
def test_a_port_of_the_host_is_given_once(texts: list[str], *, fits: bool) -> None:
    if fits:
        assert len(arguments.ports(texts)) == 2
    else:
        with pytest.raises(errors.UsageError, match="asks for port 80 of the host a second time"):
            arguments.ports(texts)


def test_volumes(tmp_path: Path) -> None:
    volumes, mounts = arguments.volumes([f"{tmp_path}:/data", "./new:/srv/../other/:ro"], str(tmp_path))
    assert volumes == (
        model.Volume("volume-0", str(tmp_path)),
        model.Volume("volume-1", f"{tmp_path}/new", "DirectoryOrCreate"),
    )
    assert mounts == (model.VolumeMount("volume-0", "/data"), model.VolumeMount("volume-1", "/other", read_only=True))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("/data", "is not HOST:CONTAINER or HOST:CONTAINER:ro"),
        (":/data", "is not HOST:CONTAINER or HOST:CONTAINER:ro"),
        ("/a:", "is not HOST:CONTAINER or HOST:CONTAINER:ro"),
        ("data:/data", "'data' is no path, and there are no named volumes"),
        ("/a:/b:z", "'z' is neither ro nor rw"),
        ("/a:b", "the place in the container must be an absolute path, not /"),
        ("/a://", "the place in the container must be an absolute path, not /"),
        ("/a:/b/..", "the place in the container must be an absolute path, not /"),
    ],
)
def test_what_is_no_volume(text: str, problem: str) -> None:
    with pytest.raises(errors.UsageError, match="--volume") as caught:
        arguments.volumes([text], "/")
    assert problem in caught.value.message


def test_two_volumes_at_one_place() -> None:
    with pytest.raises(errors.UsageError, match="something else is to be at /x already"):
        arguments.volumes(["/a:/x", "/b:/x/"], "/")


@pytest.mark.parametrize(
    ("text", "security"),
    [
        ("1000", model.Security(run_as_user=1000)),
        ("0:0", model.Security(run_as_user=0, run_as_group=0)),
        ("www", model.Security(run_as_name="www")),
        ("root", model.Security(run_as_user=0)),
        ("root:5", model.Security(run_as_user=0, run_as_group=5)),
        ("www:33", model.Security(run_as_name="www", run_as_group=33)),
    ],
)
def test_users(text: str, security: model.Security) -> None:
    assert arguments.user(text) == security


@pytest.mark.parametrize("text", ["", ":1", "1:", "1:staff", "4294967295", "1:4294967295", "9" * 40])
def test_what_is_no_user(text: str) -> None:
    with pytest.raises(errors.UsageError, match="--user"):
        arguments.user(text)


@pytest.mark.parametrize(
    ("options", "security"),
    [
        ((), model.Security(seccomp="RuntimeDefault")),
        (("seccomp=unconfined",), model.Security(seccomp="Unconfined")),
        (("seccomp:unconfined", "seccomp=builtin"), model.Security(seccomp="RuntimeDefault")),
        (("apparmor=unconfined",), model.Security(seccomp="RuntimeDefault", apparmor="unconfined")),
        (("no-new-privileges",), model.Security(seccomp="RuntimeDefault", no_new_privileges=True)),
        (("no-new-privileges:true",), model.Security(seccomp="RuntimeDefault", no_new_privileges=True)),
        (("no-new-privileges=false",), model.Security(seccomp="RuntimeDefault")),
    ],
)
def test_security_options(options: tuple[str, ...], security: model.Security) -> None:
    assert arguments.security(options, "/") == security


def test_a_seccomp_profile_is_read_before_anything_is_made(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    for text, problem in (
        ("{", "the seccomp profile profile.json is no JSON: "),
        ("[]", "profile.json is no seccomp profile: it has no defaultAction"),
    ):
        profile.write_text(text)
        with pytest.raises(errors.UsageError, match=f"^{problem}"):
            arguments.security(["seccomp=profile.json"], str(tmp_path))
    profile.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert arguments.security(["seccomp=profile.json"], str(tmp_path)).seccomp == str(profile)
    with pytest.raises(errors.UsageError, match="the seccomp profile missing can't be read: No such file"):
        arguments.security(["seccomp=missing"], str(tmp_path))


@pytest.mark.parametrize("option", ["", "seccomp", "seccomp=", "label=disable", "no-new-privileges=", "no-new-privileges=1", "SECCOMP=x"])  # fmt: skip
def test_what_is_no_security_option(option: str) -> None:
    with pytest.raises(errors.UsageError, match=r"^--security-opt .* is not supported$"):
        arguments.security([option], "/")


def test_capabilities_in_all_spellings() -> None:
    found = arguments.security((), "/", add=["CAP_NET_RAW,sys_time", "all"], drop=["cap_chown"], privileged=True)
    assert (found.add_capabilities, found.drop_capabilities) == (("NET_RAW", "SYS_TIME", "ALL"), ("CHOWN",))
    assert found.privileged
    with pytest.raises(errors.UsageError, match="--cap-drop has 'NET', which is no capability"):
        arguments.security((), "/", drop=["NET"])


@pytest.mark.parametrize("name", ["web", "Web-1.example.com", "a" * 64])
def test_host_names(name: str) -> None:
    assert arguments.hostname(name) == name


@pytest.mark.parametrize("name", ["a_b", "-a", "a..b", "a b", "a" * 65, "ä"])
def test_what_is_no_host_name(name: str) -> None:
    with pytest.raises(errors.UsageError, match="--hostname "):
        arguments.hostname(name)


def test_variables() -> None:
    assert arguments.variables(["A=1", "B=two words", "A=b=c", "D="]) == (
        ("A", "1"),
        ("B", "two words"),
        ("A", "b=c"),
        ("D", ""),
    )


@pytest.mark.parametrize("text", ["A", "=x", "A B=1", "A=\0", ""])
def test_what_is_no_variable(text: str) -> None:
    with pytest.raises(errors.UsageError, match="is not NAME=VALUE"):
        arguments.variables([text])


def test_an_image_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "archive.tar").touch()
    (tmp_path / "result").symlink_to("archive.tar")
    for text in ("result", "./result", f"{tmp_path}/result"):
        assert arguments.image(text, str(tmp_path)) == f"nix:0{tmp_path}/archive.tar"
    assert arguments.image("busybox:1", str(tmp_path)) == "busybox:1"
