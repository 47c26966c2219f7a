"""Which ctr takes our place: that beside the node's containerd only where nobody else can have put it there; files are given away for
that, which takes root."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixlet.node.settings import config

STRANGER = 12345

#: Listens at a socket and becomes a program that stays.
LISTENER = """
import os, socket, sys
path, program = sys.argv[1:]
listening = socket.socket(socket.AF_UNIX)
listening.bind(path)
listening.listen()
listening.set_inheritable(True)
os.execv(program, ["sleep", "1000"])
"""


@contextlib.contextmanager
def listening(path: str, program: Path) -> Iterator[None]:
    argv = [sys.executable, "-P", "-c", LISTENER, path, str(program)]
    with subprocess.Popen(argv) as process:
        try:
            while process.poll() is None and os.readlink(f"/proc/{process.pid}/exe") != str(program):
                os.sched_yield()
            yield
        finally:
            process.kill()


def put_ctr(directory: Path, says: str) -> None:
    directory.mkdir()
    (directory / "ctr").write_text(f"#!/bin/sh\necho {says}\n")
    (directory / "ctr").chmod(0o755)


def leave(_: Path) -> None:
    """Nothing is given away."""


def give_program(directory: Path) -> None:
    os.chown(directory / "ctr", STRANGER, -1)


def give_directory(directory: Path) -> None:
    os.chown(directory, STRANGER, -1)


def give_parent(directory: Path) -> None:
    os.chown(directory.parent, STRANGER, -1)


def open_directory(directory: Path) -> None:
    directory.chmod(0o777)


@pytest.mark.parametrize(
    ("give", "said"),
    [
        (leave, "beside"),
        (give_program, "path"),
        (give_directory, "path"),
        (give_parent, "path"),
        (open_directory, "path"),
    ],
)
def test_ctr_is_nobody_elses(tmp_path: Path, give: Callable[[Path], None], said: str) -> None:
    (tmp_path / "theirs").mkdir()
    programs = tmp_path / "theirs" / "bin"
    put_ctr(programs, "beside")
    put_ctr(tmp_path / "path", "path")
    containerd = Path(shutil.copy(os.path.realpath(shutil.which("sleep") or "sleep"), programs / "containerd"))
    state = tmp_path / "state"
    socket = config.Layout("", str(state)).containerd_socket
    os.makedirs(os.path.dirname(socket))
    with listening(socket, containerd):
        give(programs)
        environment = {**os.environ, "PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}"}
        argv = [sys.executable, "-P", "-m", "nixlet", "ctr", "--state-dir", str(state), "version"]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{said}\n"
