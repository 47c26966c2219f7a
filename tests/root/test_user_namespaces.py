"""What a snapshotter does as root of a user namespace to which the store's owner is nobody."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.snapshots import probe
from support import users


@pytest.fixture(scope="module")
def user() -> Iterator[users.User]:
    with users.User.made(61) as made:
        yield made


@pytest.fixture
def place(user: users.User) -> Iterator[Path]:
    """A directory of that user's, with a store beside it that is root's."""
    base = Path(tempfile.mkdtemp(dir=user.base))
    base.chmod(0o755)
    user.own(base / "root")
    (base / "store/pkg/bin").mkdir(parents=True)
    (base / "store/file").write_text("a plain file")
    yield base
    shutil.rmtree(base)


def inside(user: users.User, *argv: str) -> "subprocess.CompletedProcess[str]":
    """A command as root of a namespace in which there is nobody else than the user."""
    return user.run("unshare", "--user", "--map-root-user", *argv)


def test_bind_mounts_work_there_and_views_do_not(user: users.User, place: Path) -> None:
    done = inside(user, *probe.command(str(place / "root"), str(place / "store")))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["passing"] == []
    assert found["findings"]["bind"] == ""
    assert "Operation not permitted" in found["findings"]["view"]
    assert os.listdir(place / "root") == []


SKELETON = """
import os, sys
from nixlet.snapshots import model, views
root, store = sys.argv[1:]
os.mkdir(f"{root}/views")
made = views.Views(f"{root}/views", store_dir="/nix/store", real_store_dir=store)
seen, missing = made.look(["pkg", "file"])
layer = made.show(1, seen, model.Strategy.BIND)
for name in ("pkg", "file"):
    status = os.stat(f"{layer}/nix/store/{name}")
    print(name, status.st_uid, status.st_gid, oct(status.st_mode & 0o7777), int(status.st_mtime))
print(open(f"{layer}/nix/store/file").read())
"""


def test_a_skeleton_belongs_to_root_of_the_namespace(user: users.User, place: Path) -> None:
    (place / "store/file").chmod(0o444)
    for name in ("pkg", "file"):
        os.utime(place / "store" / name, (1, 1))
    (place / "store/pkg").chmod(0o555)
    done = inside(user, sys.executable, "-P", "-c", SKELETON, str(place / "root"), str(place / "store"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["pkg 0 0 0o555 1", "file 0 0 0o444 1", "a plain file"]
    assert os.stat(place / "root/views/1.skeleton/v/nix/store/file").st_uid == user.uid
