"""Wrong settings, each given to the real program: one sentence that names what is wrong, what to do, and nothing left behind.

What shows before anything is started is tried here once a kind; every value of every setting has its case in the unit tests.
"""

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from nixlet.host import mounts, network
from support import nodes, parts

pytestmark = pytest.mark.slow

#: These stand for a test's own places in the cases below.
TMP, DATA, STATE = "{tmp}", "{data}", "{state}"

ETC = f"{DATA}/agent/etc/containerd"
REAL = parts.containerd("1.6.20")

#: A containerd that says what it is as the real one does, and does something else when it is to serve.
SAYS = f'#!/bin/sh\ncase "$1" in --version|config) exec {REAL} "$@";; esac\n'


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What a person reads."""

    sentence: str
    output: Sequence[str]
    hint: str


@pytest.fixture
def node(tmp_path: Path) -> Iterator[nodes.Node]:
    made = nodes.Node(14, tmp_path)
    with nodes.cleaned_up(made):
        yield made


def traces(node: nodes.Node) -> dict[str, object]:
    """What a start that failed must leave as it was."""
    below = [path for place in (node.data_dir, node.state_dir) if place.exists() for path in place.rglob("*")]
    lock = node.data_dir / "nixlet.lock"
    free = True
    if lock.is_file():
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
    return {
        "mounts": sorted(node.mounts()),
        "processes": nodes.processes_below(node.state_dir),
        "sockets": sorted(str(path) for path in below if path.is_symlink() or path.is_socket()),
        "temporary": sorted(str(path) for path in below if path.name.startswith(".")),
        "roots": sorted(node.gc_roots.iterdir()) if node.gc_roots.exists() else [],
        "bridge": network.bridge_exists(node.bridge),
        "lock is free": free,
    }


def refused(node: nodes.Node, *arguments: str, status: int = 125, **environment: str) -> Refusal:
    """Start a node that must refuse; what a person reads, who gets one sentence and at most one hint."""
    before = traces(node)
    argv = [sys.executable, "-m", "nixlet", "server", *node.arguments, *arguments]
    environment = {**node.environment, **environment}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    # The rest is the log.
    sentence, *more = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert sentence.startswith("error: "), done.stderr
    hint = more.pop() if more and more[-1].startswith("hint: ") else ""
    assert all(line.startswith("  | ") for line in more), done.stderr
    assert traces(node) == before
    return Refusal(sentence.removeprefix("error: "), [line[4:] for line in more], hint.removeprefix("hint: "))


@dataclasses.dataclass(frozen=True)
class Case:
    """A wrong setting.

    Attributes:
        sentence: What must be said, from its beginning on.
        hint: How what to do begins.
        arguments: Flags.
        environment: Variables.
        files: Files by path; those that begin with "#!" are programs, and None is a directory.
        mode: The mode of the files.
        status: How the program ends.
    """

    sentence: str
    hint: str = ""
    arguments: Sequence[str] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    files: dict[str, str | bytes | None] = dataclasses.field(default_factory=dict)
    mode: int = 0o644
    status: int = 125


FILE = f"{TMP}/config.yaml"
CONFIG = ("--config", FILE)
BASE = '{{ template "base" . }}\n'

CASES = {
    # Configuration files.
    "bad YAML": Case(
        f"{FILE}, line 2, column 8: this is no YAML", arguments=CONFIG, files={FILE: "\nrunc: a: b\n"}, status=2
    ),
    "unknown key": Case(
        f"{FILE}, line 1: snapshoter is not a known key",
        'did you mean "snapshotter"?',
        arguments=CONFIG,
        files={FILE: "snapshoter: nix\n"},
        status=2,
    ),
    "wrong type": Case(
        f"{FILE}, line 1: pod-cidr must be a string", arguments=CONFIG, files={FILE: "pod-cidr: [10]\n"}, status=2
    ),
    "a directory for a file": Case(
        f"the configuration file {FILE} can't be read: Is a directory", arguments=CONFIG, files={FILE: None}, status=2
    ),
    "not UTF-8": Case(
        f"{FILE}, line 1, column 7: this is no YAML", arguments=CONFIG, files={FILE: b"runc: \xff\n"}, status=2
    ),
    "anyone can write": Case(
        f"{FILE} can be written by everyone, who could have the node run anything",
        f"check what stands there, then: chmod go-w {FILE}",
        arguments=CONFIG,
        files={FILE: "runc: /tmp/evil\n"},
        mode=0o666,
    ),
    "missing file": Case(
        f"the configuration file {FILE} does not exist", "--config names it", arguments=CONFIG, status=2
    ),
    "a drop-in": Case(
        f"{FILE}.d/10-x.yaml, line 2: strategy 'best' is not known",
        "use auto or view or bind",
        CONFIG,
        files={FILE: "", f"{FILE}.d/10-x.yaml": "# x\nstrategy: best\n"},
        status=2,
    ),
    "a list of registries": Case(
        f"{TMP}/registries.yaml, line 3: configs.x.io.tls.insecure_skip_verify must be true or false",
        files={f"{TMP}/registries.yaml": "configs:\n  x.io:\n    tls: {insecure_skip_verify: perhaps}\n"},
        status=2,
    ),
    # Values.
    "a variable's truth": Case(
        "NIXLET_SELINUX must be true or false, not 'perhaps'", environment={"NIXLET_SELINUX": "perhaps"}, status=2
    ),
    "a variable's address": Case(
        "NIXLET_HEALTH_ADDRESS '0.0.0.0:80' is no loopback address",
        "use 127.0.0.1:PORT",
        environment={"NIXLET_HEALTH_ADDRESS": "0.0.0.0:80"},
        status=2,
    ),
    "pod-cidr": Case(
        "--pod-cidr '10.0.0.0/33' is not a network", "as in 10.63.0.0/16", ("--pod-cidr", "10.0.0.0/33"), status=2
    ),
    "bridge": Case("--bridge 'a b' is no interface name of at most 15", arguments=("--bridge", "a b"), status=2),
    "port": Case(
        "--health-address '127.0.0.1:99999' is not HOST:PORT",
        "use 127.0.0.1:PORT",
        ("--health-address", "127.0.0.1:99999"),
        status=2,
    ),
    "a long state directory": Case(
        f"--state-dir /run/{'x' * 60} is longer than 60 characters, which socket paths don't allow",
        arguments=("--state-dir", f"/run/{'x' * 60}"),
        status=2,
    ),
    # Programs.
    "no containerd": Case(
        "/no/containerd is not installed",
        "install it (Debian: apt install containerd) or say where it is: --containerd",
        ("--containerd", "/no/containerd"),
    ),
    "no runc": Case("/no/runc is not installed", "install it (Debian: apt install runc)", ("--runc", "/no/runc")),
    "no pause": Case("/no/pause is not installed", "install it (Debian: apt install cata", ("--pause", "/no/pause")),
    "no plugins": Case(
        f"the CNI plugins bridge, host-local, portmap, loopback are not in any of {TMP}",
        "install them (Debian: apt install containernetworking-plugins) or say where they are: --cni-bin-dir",
        ("--cni-bin-dir", TMP),
    ),
    "no Nix": Case(
        f'"nix" snapshotter cannot be enabled for "{DATA}/agent/containerd", try using "overlayfs" or "native": '
        "nix-store not found in PATH",
        "PATH is /usr/sbin;",
        environment={"PATH": "/usr/sbin", "NIX_DAEMON_SOCKET_PATH": "/no/nix"},
    ),
    "a directory for a program": Case(
        f"{TMP} is not a program that can be run", "name the containerd program: --containerd", ("--containerd", TMP)
    ),
    "another program": Case(
        f"{TMP}/other (other 1.0) is no containerd: it names no version of its configuration",
        "name the containerd program: --containerd",
        ("--containerd", f"{TMP}/other"),
        files={f"{TMP}/other": "#!/bin/sh\necho other 1.0\necho Copyright\n"},
    ),
    "a program that fails": Case(
        "other ended with status 3: what is --version?",
        f"the command was: {TMP}/other --version",
        ("--containerd", f"{TMP}/other"),
        files={f"{TMP}/other": '#!/bin/sh\necho "what is $1?" >&2\nexit 3\n'},
    ),
    "a later containerd": Case(
        f"{TMP}/later (9.0.0) speaks configuration version 5, and nixlet renders 2, 3, 4",
        "use containerd 1.6 to 2.4",
        ("--containerd", f"{TMP}/later"),
        files={f"{TMP}/later": "#!/bin/sh\necho containerd c v9.0.0 x\necho version = 5\n"},
    ),
    "a pause program with libraries": Case(
        "/bin/sh can't hold a pod's namespaces: it is no statically linked program",
        "install catatonit (Debian: apt install catatonit), or name another static program: --pause",
        ("--pause", "/bin/sh"),
    ),
    "a runtime that is not there": Case(
        "default runtime crun-x was not found", "there are ", ("--default-runtime", "crun-x"), status=2
    ),
    # Templates and drop-ins of containerd's configuration.
    "a template with a table of the base": Case(
        f"{ETC}/config.toml.tmpl: grpc.address can't be set: the node sets it",
        "--state-dir says where a node's sockets are",
        files={f"{ETC}/config.toml.tmpl": f"{BASE}[grpc]\naddress = 'x'\n"},
        status=2,
    ),
    "a template that is no TOML": Case(
        f"{ETC}/config.toml.tmpl, line 3", files={f"{ETC}/config.toml.tmpl": f"{BASE}\noom_score = = 1\n"}, status=2
    ),
    "drop-ins that contradict each other": Case(
        f"{ETC}/config.toml.d/1.toml and {ETC}/config.toml.d/2.toml say different things of oom_score",
        "leave it to one of the two",
        files={f"{ETC}/config.toml.d/1.toml": "oom_score = 1\n", f"{ETC}/config.toml.d/2.toml": "oom_score = 2\n"},
        status=2,
    ),
    "a drop-in that is no TOML": Case(
        f"{ETC}/config.toml.d/1.toml, line 2, column ", files={f"{ETC}/config.toml.d/1.toml": "\n[a\n"}, status=2
    ),
    # Places.
    "a file for the data directory": Case(
        f"can't make the directory {DATA}: File exists", "move away what has that name", files={DATA: ""}
    ),
    "a file on the way to the state directory": Case(
        f"can't make the directory {STATE}/f/s: Not a directory",
        "move away what has that name",
        ("--state-dir", f"{STATE}/f/s"),
        files={f"{STATE}/f": ""},
    ),
    "a directory for the lock": Case(
        f"the lock {DATA}/nixlet.lock can't be opened: Is a directory",
        "move away what has that name",
        files={f"{DATA}/nixlet.lock": None},
    ),
    "a directory for containerd's configuration": Case(
        f"{ETC}/config.toml can't be written: Is a directory",
        "move away what has that name",
        files={f"{ETC}/config.toml": None},
    ),
    "a directory for containerd's log": Case(
        f"the log of containerd can't be written to {DATA}/agent/containerd/containerd.log: Is a directory",
        files={f"{DATA}/agent/containerd/containerd.log": None},
    ),
    "a directory for the log": Case(
        f"the log can't be written to {TMP}: Is a directory",
        "name a file in a directory that exists: --log",
        ("--log", TMP),
        status=2,
    ),
    "no directory for the log": Case(
        f"the log can't be written to {TMP}/no/log: No such file or directory",
        "name a file in a directory that exists: --log",
        ("--log", f"{TMP}/no/log"),
        status=2,
    ),
    "a file for the socket": Case(
        f"{STATE}/containerd/nix-snapshotter.sock exists and is no socket",
        "remove it, or choose another directory",
        files={f"{STATE}/containerd/nix-snapshotter.sock": ""},
    ),
    "a file in place of what containerd keeps": Case(
        "containerd serves no CRI: failed to get services: ",
        "see its log",
        files={f"{DATA}/agent/containerd/io.containerd.metadata.v1.bolt": "", f"{DATA}/nixlet.lock": ""},
    ),
}


def fill_in(node: nodes.Node, text: str) -> str:
    places = {TMP: node.log.parent, DATA: node.data_dir, STATE: node.state_dir}
    return re.sub("{tmp}|{data}|{state}", lambda found: str(places[found[0]]), text)


def write(node: nodes.Node, files: dict[str, str | bytes | None], mode: int) -> None:
    for name, content in files.items():
        path = Path(fill_in(node, name))
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
            continue
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(data)
        path.chmod(0o755 if data.startswith(b"#!") else mode)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_wrong_setting(node: nodes.Node, case: Case) -> None:
    write(node, case.files, case.mode)
    arguments = [fill_in(node, argument) for argument in case.arguments]
    said = refused(node, *arguments, status=case.status, **case.environment)
    assert said.sentence.startswith(fill_in(node, case.sentence)), said
    assert said.hint.startswith(fill_in(node, case.hint)), said


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("--brigde", "x"), {}, "there is no option --brigde"),
        (("--bridge",), {}, "option '--bridge' requires an argument"),
        (("extra",), {}, "got unexpected extra argument (extra)"),
        ((), {"NIXLET_DEBUG": "perhaps"}, "invalid value for '--debug': 'perhaps' is not a valid boolean"),
    ],
)
def test_a_wrong_command_line(
    node: nodes.Node, arguments: Sequence[str], environment: dict[str, str], said: str
) -> None:
    node.environment |= environment
    done = node.run("server", *node.arguments, *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    sentence, hint = done.stderr.decode().splitlines()
    assert sentence.startswith(f"error: {said}")
    assert hint.startswith("hint: ")
    assert ("did you mean --bridge?" in hint) is ("--brigde" in arguments)
    assert not node.data_dir.exists()


def test_a_containerd_that_dies_at_its_start(node: nodes.Node) -> None:
    write(node, {f"{TMP}/dies": f'{SAYS}seq 30\necho "the disk is on fire"\nexit 7\n'}, 0o644)
    program = fill_in(node, f"{TMP}/dies")
    said = refused(node, "--containerd", program)
    assert said.sentence == "containerd ended with status 7: the disk is on fire"
    assert said.output == [*(str(number) for number in range(22, 31)), "the disk is on fire"]
    assert said.hint.startswith(f"the command was: {program} --config={node.data_dir}/")
    assert said.hint.endswith(f"; its log is {node.containerd_log}")
    assert node.containerd_log.read_text().endswith("30\nthe disk is on fire\n")


@contextlib.contextmanager
def served(address: Path | tuple[str, int]) -> Iterator[socket.socket]:
    """Somebody who listens there."""
    with socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET) as sock:
        if isinstance(address, Path):
            address.parent.mkdir(parents=True, exist_ok=True)
        sock.bind(str(address) if isinstance(address, Path) else address)
        sock.listen()
        yield sock


@pytest.mark.parametrize("name", ["containerd/nix-snapshotter.sock", "containerd/containerd.sock", "health.sock"])
def test_a_socket_that_is_taken(node: nodes.Node, name: str) -> None:
    with served(node.state_dir / name):
        said = refused(node)
    assert said.sentence == f"another process serves the socket {node.state_dir}/{name}"
    assert said.hint.startswith("stop that ")


def test_a_port_that_is_taken(node: nodes.Node) -> None:
    with served(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        said = refused(node, "--health-address", f"127.0.0.1:{port}")
    sentence = f"can't listen on 127.0.0.1 port {port}: Address already in use"
    assert said == Refusal(sentence, [], "choose another port: --health-address")


def test_sockets_that_nobody_serves_any_more(node: nodes.Node) -> None:
    stale = [
        node.node_socket,
        node.containerd_socket,
        Path(f"{node.containerd_socket}.ttrpc"),
        node.state_dir / "health.sock",
    ]
    with contextlib.ExitStack() as stack:
        for path in stale:
            stack.enter_context(served(path))
    assert all(path.is_socket() for path in stale)
    node.start()
    assert node.stop() == 0
    assert [path for path in stale if path.exists()] == []


def test_two_nodes_in_one_place(node: nodes.Node, any_node: nodes.Node, tmp_path: Path) -> None:
    own = node.arguments
    node.arguments = [*own, "--data-dir", str(any_node.data_dir)]
    said = refused(node)
    assert said.sentence == f"the data directory {any_node.data_dir} is in use by process {any_node.pid}"
    assert said.hint == "stop that process, or choose another directory"
    node.arguments = [*own, "--state-dir", str(any_node.state_dir)]
    said = refused(node)
    theirs = f"{any_node.state_dir} is the state directory of the node at {any_node.data_dir}"
    assert (said.sentence, said.hint) == (theirs, "choose another directory: --state-dir")
    assert any_node.version()["node"] is not None
    assert any_node.node_socket.is_socket()


@contextlib.contextmanager
def disk(path: Path, options: str) -> Iterator[None]:
    """A small file system of its own at ``path``."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        mounts.unmount(str(path))


def test_a_data_directory_that_can_only_be_read(node: nodes.Node) -> None:
    with disk(node.data_dir, "ro"):
        said = refused(node)
        assert said.sentence == f"the lock {node.data_dir}/nixlet.lock can't be opened: Read-only file system"
        assert said.hint == "choose a directory on a file system that can be written"
        said = refused(node, "--log", f"{node.data_dir}/log", status=2)
        assert said.sentence == f"the log can't be written to {node.data_dir}/log: Read-only file system"


@pytest.mark.parametrize(
    ("kilobytes", "what"),
    [
        (0, "the lock {data}/nixlet.lock can't be written"),
        (4, "{data}/nixlet.json can't be written"),
        (8, "{data}/agent/etc/containerd/config.toml can't be written"),
        (16, "the lock {data}/agent/containerd/io.containerd.snapshotter.v1.nix/lock can't be written"),
        (512, "the snapshotter's database {data}/agent/containerd/io.containerd.snapshotter.v1.nix/nixlet.db can't be written"),
        (5400, "the archive of the pause image can't be written to {data}/agent/images"),
        (6200, "the pause image can't be loaded: write {data}/agent/containerd/"),
    ],
)  # fmt: skip
def test_a_full_disk(node: nodes.Node, kilobytes: int, what: str) -> None:
    with disk(node.data_dir, "size=8m"):
        (node.data_dir / "ballast").write_bytes(bytes((8192 - kilobytes) * 1024))
        assert shutil.disk_usage(node.data_dir).free == kilobytes * 1024
        said = refused(node)
    assert said.sentence.startswith(fill_in(node, what)), said
    assert said.sentence.lower().endswith(": no space left on device")
    # Of a file of containerd's the file system is its own.
    assert said.hint.startswith(("make room on that file system", "make room on its file system"))


def test_an_ordinary_user(node: nodes.Node) -> None:
    argv = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--", sys.executable, "-m", "nixlet"]
    done = subprocess.run([*argv, "server", *node.arguments], env=node.environment, capture_output=True, check=False)
    assert done.returncode == 125
    assert done.stderr.decode().splitlines() == [
        "error: a node needs root rights (CAP_SYS_ADMIN)",
        "hint: run it as root: sudo nixlet server; or have one of your own: nixlet server --rootless",
    ]
    assert not os.path.lexists(node.data_dir)
