"""Whose rights a further process in a container has."""

import os
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.kube import arguments, users

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
    with pytest.raises(errors.NotFoundError):
        found(tmp_path, "root")


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
