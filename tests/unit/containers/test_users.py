"""Whose rights a further process in a container has."""

import os
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.containers import arguments, model, users
from nixlet.rpc.gen import cri_pb2

PASSWD = "root:x:0:0:root:/root:/bin/sh\nbroken\nada:x:1000:100:Ada:/home/ada:/bin/sh\nodd:x:-1:x::/:\nbob:x:1001:101::/:/bin/sh\n"
GROUP = "users:x:100:\nwheel:x:1:root,ada\naudio:x:29:ada,bob\nbroken:x\nodd:x:many:ada\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root/etc").mkdir(parents=True)
    (tmp_path / "root/etc/passwd").write_text(PASSWD)
    (tmp_path / "root/etc/group").write_text(GROUP)
    return tmp_path / "root"


def found(root: Path, text: str) -> users.Ids:
    return users.find(str(root), arguments.user(text))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("ada", users.Ids(1000, 100, (100, 1, 29))),
        ("bob", users.Ids(1001, 101, (101, 29))),
        ("root", users.Ids(0, 0, (0, 1))),
        ("1000", users.Ids(1000, 100, (100, 1, 29))),
        ("77", users.Ids(77, 0, (0,))),
        ("ada:5", users.Ids(1000, 5, (5,))),
        ("77:5", users.Ids(77, 5, (5,))),
    ],
)
def test_users(root: Path, text: str, ids: users.Ids) -> None:
    assert found(root, text) == ids


@pytest.mark.parametrize("name", ["eve", "odd", "broken"])
def test_a_name_that_the_container_has_not(root: Path, name: str) -> None:
    with pytest.raises(errors.NotFoundError, match=f"the container has no user {name}$"):
        found(root, name)


def test_a_container_without_files(tmp_path: Path) -> None:
    assert found(tmp_path, "5") == users.Ids(5, 0, (0,))
    assert found(tmp_path, "root") == users.Ids(0, 0, (0,))
    with pytest.raises(errors.NotFoundError, match="the container has no user ada") as caught:
        found(tmp_path, "ada")
    assert "give the number of one" in caught.value.hint


def test_a_line_without_a_name_is_nobodys(root: Path) -> None:
    (root / "etc/passwd").write_text(":x:0:0::/:\n" + PASSWD)
    assert found(root, "1000").uid == 1000
    assert found(root, "77").uid == 77


def test_only_a_line_feed_ends_a_line(root: Path) -> None:
    (root / "etc/passwd").write_text("ada:x:1000:100:Ada\u2028eve:x:0:0\x0ceve:x:0:0\x85eve:x:0:0::/:\n", newline="")
    assert found(root, "ada").uid == 1000
    with pytest.raises(errors.NotFoundError):
        found(root, "eve")


def image(user: str) -> cri_pb2.Image:
    """An image as CRI tells it: containerd parts a number from a name."""
    if user.isdigit():
        return cri_pb2.Image(uid=cri_pb2.Int64Value(value=int(user)))
    return cri_pb2.Image(username=user)


#: What a pod says, what its container says, the image's user, and what CRI is told: user, name, group.
@pytest.mark.parametrize(
    ("pod", "own", "user", "told"),
    [
        ({}, {}, "1000", (None, "", None)),
        ({}, {"run_as_group": 5}, "", (0, "", 5)),
        ({}, {"run_as_group": 5}, "1000", (1000, "", 5)),
        ({}, {"run_as_group": 5}, "www", (None, "www", 5)),
        ({"run_as_group": 5}, {}, "1000", (1000, "", None)),
        ({"run_as_user": 7}, {"run_as_group": 5}, "1000", (7, "", 5)),
        ({"run_as_user": 7}, {"run_as_name": "www", "run_as_group": 5}, "1000", (None, "www", 5)),
        ({"run_as_non_root": True}, {}, "1000", (None, "", None)),
        ({"run_as_non_root": True}, {"run_as_user": 7}, "", (7, "", None)),
        ({"run_as_non_root": True}, {"run_as_non_root": False}, "", (None, "", None)),
    ],
)
def test_who_a_container_runs_as(
    pod: dict[str, Any], own: dict[str, Any], user: str, told: tuple[int | None, str, int | None]
) -> None:
    container = model.Container("main", "web:1", "Never", security=model.Security(**own))
    security = users.resolved(model.Pod("web", **pod), container, image(user)).security
    assert (security.run_as_user, security.run_as_name, security.run_as_group) == told


@pytest.mark.parametrize(
    ("own", "user", "why"),
    [
        ({}, "", "its image runs as root"),
        ({}, "0", "its image runs as root"),
        ({}, "www", "whether its image's user www is root can't be told"),
        ({"run_as_user": 0}, "1000", "it runs as root"),
    ],
)
def test_who_must_not_be_root(own: dict[str, Any], user: str, why: str) -> None:
    security = model.Security(**own, run_as_non_root=True)
    container = model.Container("main", "web:1", "Never", security=security)
    with pytest.raises(errors.FailedPreconditionError) as caught:
        users.resolved(model.Pod("web"), container, image(user))
    assert caught.value.message == f"container main must not run as root (runAsNonRoot), and {why}"


def test_links_stay_in_the_container(root: Path, tmp_path: Path) -> None:
    """Nix has these files as links into the store; a hostile image has them as links to the host's."""
    (root / "nix/store/x-etc").mkdir(parents=True)
    os.rename(root / "etc/passwd", root / "nix/store/x-etc/passwd")
    (root / "etc/passwd").symlink_to("/nix/store/x-etc/passwd")
    assert found(root, "ada").uid == 1000
    (root / "etc/passwd").unlink()
    (root / "etc/passwd").symlink_to("../../../nix/./store/../store/x-etc/passwd")
    assert found(root, "ada").uid == 1000
    (tmp_path / "secret").write_text("eve:x:6:6::/:\n")
    for target in (f"{tmp_path}/secret", "../../secret", "/proc/self/root/etc/passwd", "passwd", "/etc"):
        (root / "etc/passwd").unlink()
        (root / "etc/passwd").symlink_to(target)
        for name in ("eve", "daemon"):
            with pytest.raises(errors.NotFoundError):
                found(root, name)
    before = len(os.listdir("/proc/self/fd"))
    (root / "etc/passwd").unlink()
    os.mkfifo(root / "etc/passwd")
    with pytest.raises(errors.NotFoundError):
        found(root, "ada")
    assert len(os.listdir("/proc/self/fd")) == before
