"""Which ctr takes our place, and which kubectl: ctr is that beside the node's containerd only where nobody else can have put it there; files are given away for
that, which takes root."""

import contextlib
import json
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


#: Says how it was called, and ends with a status of its own.
KUBECTL = """#!/bin/sh
echo "$KUBECONFIG"
for each in "$@"; do echo "[$each]"; done
exit 7
"""


def put_kubectl(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "kubectl").write_text(KUBECTL)
    (directory / "kubectl").chmod(0o755)


def kubectl(data_dir: Path, *arguments: str, path: str = "/usr/bin:/bin", **environment: str) -> tuple[int, str, str]:
    argv = [sys.executable, "-P", "-m", "nixlet", "kubectl", "--data-dir", str(data_dir), *arguments]
    env = {"PATH": path, "NIXLET_CONFIG_FILE": os.devnull, "KUBECONFIG": "/another", **environment}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def with_cluster(directory: Path) -> Path:
    admin = directory / "data/server/cred/admin.kubeconfig"
    admin.parent.mkdir(parents=True)
    admin.write_text("")
    return admin


def test_kubectl_gets_our_cluster_its_arguments_and_the_last_word(tmp_path: Path) -> None:
    admin = with_cluster(tmp_path)
    put_kubectl(tmp_path / "bin")
    # Behind -- stands another program's command, whose cluster is another one.
    arguments = [
        "get",
        "pods",
        "-o",
        "wide",
        "--data-dir",
        "x y",
        "--",
        "--help",
        "--kubeconfig",
        "x",
        "--kubeconfig=y",
    ]
    done = kubectl(tmp_path / "data", *arguments, path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done == (7, f"{admin}\n" + "".join(f"[{each}]\n" for each in arguments), "")


def test_kubectl_is_the_one_beside_the_node_s_other_programs(tmp_path: Path) -> None:
    admin = with_cluster(tmp_path)
    put_kubectl(tmp_path / "kubernetes")
    directory = str(tmp_path / "kubernetes")
    assert kubectl(tmp_path / "data", "version", NIXLET_KUBERNETES_BIN_DIR=directory)[:2] == (
        7,
        f"{admin}\n[version]\n",
    )
    (tmp_path / "config.yaml").write_text(f"kubernetes-bin-dir: {directory}\n")
    file = str(tmp_path / "config.yaml")
    assert kubectl(tmp_path / "data", "version", NIXLET_CONFIG_FILE=file)[:2] == (7, f"{admin}\n[version]\n")
    # And where nothing says it any more, the node's last start does.
    marker = {"data_dir": str(tmp_path / "data"), "settings": {"kubernetes_bin_dir": directory}}
    (tmp_path / "data/nixlet.json").write_text(json.dumps(marker))
    assert kubectl(tmp_path / "data", "version")[:2] == (7, f"{admin}\n[version]\n")


def test_another_cluster_that_is_named_is_meant(tmp_path: Path) -> None:
    put_kubectl(tmp_path / "bin")
    done = kubectl(tmp_path / "none", "--kubeconfig=x", "get", "nodes", path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done[:2] == (7, "\n[--kubeconfig=x]\n[get]\n[nodes]\n")


def test_without_kubectl_or_a_cluster_it_is_told(tmp_path: Path) -> None:
    status, _, said = kubectl(tmp_path / "none", "get", "pods")
    assert (status, said.splitlines()[0]) == (
        125,
        f"error: there is no cluster in {tmp_path / 'none'}: no server was started there yet",
    )
    with_cluster(tmp_path)
    status, _, said = kubectl(tmp_path / "data", "get", "pods", path=str(tmp_path))
    assert (status, said.splitlines()[0]) == (127, "error: kubectl is not installed")
    (tmp_path / "agent/agent").mkdir(parents=True)
    (tmp_path / "agent/agent/cluster.json").write_text("{}")
    status, _, said = kubectl(tmp_path / "agent", "get", "pods")
    assert (status, said.splitlines()[0]) == (
        125,
        "error: this node is an agent, and the administrator's kubeconfig is on its server",
    )


def test_people_have_a_kubeconfig_of_their_own(tmp_path: Path) -> None:
    """Who may not look into the server's directory: root may look everywhere, so it isn't there here."""
    put_kubectl(tmp_path / "bin")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/kubeconfig.yaml").write_text("")
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    assert kubectl(tmp_path / "data", path=path)[:2] == (7, f"{tmp_path / 'data/kubeconfig.yaml'}\n")
    (tmp_path / "elsewhere").write_text("")
    elsewhere = str(tmp_path / "elsewhere")
    assert kubectl(tmp_path / "data", path=path, NIXLET_WRITE_KUBECONFIG=elsewhere)[:2] == (7, f"{elsewhere}\n")
