"""Nodes of an ordinary user: who starts them, what runs in them, and what is left of them."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet.host import mounts
from support import image_archives, nodes, parts, readme, storeimages, users

#: Those that can bind store paths into containers.
CONTAINERDS = [
    pytest.param(version, marks=[] if version == parts.CONTAINERDS[-1] else pytest.mark.slow)
    for version in parts.CONTAINERDS[1:]
]


@pytest.fixture(scope="module")
def user() -> Iterator[users.User]:
    with users.User.made(60) as made:
        yield made


@pytest.fixture(params=CONTAINERDS)
def node(request: pytest.FixtureRequest, user: users.User) -> Iterator[users.Node]:
    """A node that is not started yet, for each containerd."""
    yield from fresh(user, request.param)


@pytest.fixture
def newest(user: users.User) -> Iterator[users.Node]:
    """The same, with the newest containerd alone."""
    yield from fresh(user, parts.CONTAINERDS[-1])


def fresh(user: users.User, containerd: str) -> Iterator[users.Node]:
    made = users.Node(user, containerd=containerd)
    yield made
    user.end_processes()
    if made.process is not None:
        made.process.wait(60)
    # What is there is of users that only root is above all of.
    subprocess.run(["rm", "-rf", str(user.home), str(user.runtime / "nixlet")], check=True)
    user.own(user.home)


@pytest.fixture(scope="module")
def image(user: users.User, archives: Path) -> storeimages.StoreImage:
    """An image of fifty store paths, for that user."""
    made = storeimages.make(archives, 50, salt="-rootless")
    made.archive = user.give(made.archive)
    return made


def test_the_hello_container(node: users.Node, hello: str) -> None:
    node.start()
    assert node.user.ok("run", "--rm", hello) == "Hello, world!\n"
    assert node.stop() == 0
    assert node.user.processes() == {}
    assert "stopping; pods end with the node" in node.log.read_text()


def test_the_hello_pod_by_kube_play_and_through_cri(node: users.Node, hello: str) -> None:
    node.start()
    user = node.user
    assert "Hello, world!" in user.ok("kube", "play", "--wait", "-", stdin=nodes.manifest("hello", hello))
    crictl = parts.crictl(
        node.state_dir / "containerd/nix-snapshotter.sock", node.state_dir / "containerd/containerd.sock"
    )

    def cri(*arguments: str) -> str:
        done = user.run(*crictl, *arguments)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    pod, container = user.home / "pod.json", user.home / "container.json"
    # Who asks containerd itself says where cgroups may be.
    parent = f"/{user.cgroups[0].name}"
    sandbox = {
        "metadata": {"name": "cri", "uid": "cri-uid", "namespace": "default"},
        "log_directory": str(user.home),
        "linux": {"cgroup_parent": parent},
    }
    pod.write_text(json.dumps(sandbox))
    wanted = {"metadata": {"name": "hello"}, "image": {"image": hello}, "log_path": "hello.log", "linux": {}}
    container.write_text(json.dumps(wanted))
    cri("pull", hello)
    made = cri("runp", str(pod))
    started = cri("create", made, str(container), str(pod))
    cri("start", started)
    nodes.until(lambda: "CONTAINER_EXITED" in cri("inspect", started), "it has ended")
    assert "Hello, world!" in (user.home / "hello.log").read_text()
    cri("stopp", made)
    cri("rmp", made)
    assert cri("pods", "-q") == ""
    assert node.stop() == 0


@pytest.fixture
def older(user: users.User) -> Iterator[users.Node]:
    """A node with the oldest containerd that can bind."""
    yield from fresh(user, "1.7.35")


def test_without_cgroups_containerd_1_runs_containers_without_limits(older: users.Node, hello: str) -> None:
    older.start(delegated=False)
    limits = {"resources": {"limits": {"memory": "64Mi", "cpu": "100m"}}}
    manifest = nodes.manifest("hello", hello, container=limits)
    assert "Hello, world!" in older.user.ok("kube", "play", "--wait", "-", stdin=manifest)
    assert older.stop() == 0


def test_without_cgroups_containerd_2_says_what_it_needs(newest: users.Node, hello: str) -> None:
    newest.start(delegated=False)
    assert "no cgroups are delegated to this user namespace" in newest.log.read_text()
    done = newest.user.nixlet("run", "--rm", hello)
    assert done.returncode == 125
    assert done.stderr.splitlines()[-2:] == [
        "error: no cgroups are delegated to this node, and containerd 2 runs no containers without",
        "hint: have it as a service of systemd's, which delegates them: nixlet rootless setup; or use containerd 1.7",
    ]
    assert newest.user.ok("ps", "-aq") == ""
    assert newest.stop() == 0


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
def test_containerds_own_snapshotters(newest: users.Node, ordinary: Path, snapshotter: str) -> None:
    archive = newest.user.give(ordinary)
    newest.arguments += ["--snapshotter", snapshotter]
    newest.start()
    newest.user.ok("image", "load", str(archive))
    assert "bin" in newest.user.ok("run", "--rm", "localhost/ordinary:1", "/bin/ls", "/").split()
    assert newest.stop() == 0


def test_a_container_sees_its_closure_and_its_root_is_nobody_outside(
    newest: users.Node, image: storeimages.StoreImage
) -> None:
    newest.start()
    user = newest.user
    user.ok("run", "-d", "--name", "one", image.reference, "--", "/bin/sleep", "1000")
    listed = user.ok("exec", "one", "/bin/ls", "/nix/store").split()
    assert sorted(listed) == sorted(path.name for path in image.paths)
    # Nothing of the container's belongs to anybody else than that user.
    (sleeping,) = [pid for pid, name in user.processes().items() if name in {"sleep", "busybox"}]
    assert f"\nUid:\t{user.uid}\t" in Path(f"/proc/{sleeping}/status").read_text()
    # The store is the machine's, and stays as it is.
    top = Path(image.paths[0])
    done = user.nixlet("exec", "one", "/bin/busybox", "touch", f"{top}/new")
    assert done.returncode != 0
    assert not (top / "new").exists()
    assert os.stat(top).st_uid == 0
    user.ok("rm", "-f", "one")
    assert newest.stop() == 0


def test_what_an_image_replaces_whole_hides_what_was_there(newest: users.Node, busybox_layer: bytes) -> None:
    """An opaque directory, which overlays note otherwise in a user namespace."""
    below = image_archives.tar({"d/below": b"1", "e/kept": b"1"})
    above = image_archives.tar({"d/.wh..wh..opq": b"", "d/above": b"2", "e/.wh.nothing": b""})
    built = image_archives.oci([busybox_layer, below, above], name="localhost/opaque:1", config={"Env": ["PATH=/bin"]})
    archive = newest.user.images / "opaque.tar"
    archive.write_bytes(image_archives.tar(built))
    newest.start()
    user = newest.user
    user.ok("image", "load", str(archive))
    argv = ["run", "--rm", "localhost/opaque:1", "--", "/bin/sh", "-c"]
    assert user.ok(*argv, "ls /d /e").split() == ["/d:", "above", "/e:", "kept"]
    # What a container replaces itself is noted in its own layer.
    replaced = "busybox rm -r /d; busybox mkdir /d; ls /d; echo done"
    assert user.ok(*argv, replaced).split() == ["done"]


def test_what_it_needs_is_kept_from_the_collector_by_links_of_its_own(
    newest: users.Node, image: storeimages.StoreImage
) -> None:
    newest.start()
    user = newest.user
    user.ok("run", "--rm", image.reference, "--", "/bin/true")
    asked = subprocess.run(
        ["nix-store", "--query", "--roots", image.paths[-1]], capture_output=True, text=True, check=True
    )
    holding = [line for line in asked.stdout.splitlines() if str(newest.data_dir) in line]
    assert len(holding) == 1
    assert not Path("/nix/var/nix/gcroots/nixlet", user.name).exists()
    # Links that Nix has forgotten are told again at the next start.
    auto = Path("/nix/var/nix/gcroots/auto")
    (known,) = [
        each
        for each in auto.iterdir()
        if str(newest.data_dir) in os.readlink(each) and image.info in os.readlink(os.readlink(each))
    ]
    known.unlink()
    assert newest.stop() == 0
    newest.start()
    nodes.until(lambda: os.path.islink(known), "Nix knows of the roots again")


PORT = 18_060


def answer(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as asked:
        asked.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return asked.makefile("rb").read()


def test_a_port_of_the_machine_leads_to_a_pod(newest: users.Node, image: storeimages.StoreImage) -> None:
    newest.start()
    user = newest.user
    serve = [image.reference, "--", "/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/nix/store"]
    user.ok("run", "-d", "--name", "web", "-p", f"{PORT}:8080", *serve)
    nodes.until(lambda: b"404 Not Found" in answer(PORT), "the pod answers")
    assert f"0.0.0.0:{PORT}->8080/tcp" in user.ok("inspect", "web")
    # It is the pod's.
    with socket.create_server(("127.0.0.1", PORT + 1)):
        for port, why in (
            (PORT, "is offered for pod web already"),
            (PORT + 1, "address already in use"),
            (80, "privileged port 80"),
        ):
            done = user.nixlet("run", "-d", "-p", f"{port}:8080", *serve)
            assert (done.returncode, why in done.stderr) == (125, True), done.stderr
    assert user.ok("ps", "-aq").split() == user.ok("ps", "-q").split()
    user.ok("rm", "-f", "web")

    def is_free() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", PORT)) != 0

    nodes.until(is_free, "the port is free")
    user.ok("run", "-d", "--name", "next", "-p", f"127.0.0.1:{PORT}:8080", *serve)
    nodes.until(lambda: b"404 Not Found" in answer(PORT), "the next pod answers")
    assert newest.stop() == 0
    assert is_free()


def test_it_is_its_users_alone(newest: users.Node, user: users.User) -> None:
    newest.start()
    assert (os.stat(newest.state_dir / "node.sock").st_mode & 0o777) == 0o600
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    for name in ("node.sock", "containerd/containerd.sock", "containerd/nix-snapshotter.sock"):
        path = newest.state_dir / name
        assert path.is_socket()
        assert subprocess.run([*nobody, "test", "-e", str(path)], check=False).returncode == 1
    # The machine's root has a node of its own, and is nobody here.
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(30)
        stranger.connect(str(newest.state_dir / "node.sock"))
        assert stranger.recv(1) == b""


def ready(node: users.Node) -> str:
    return node.user.run(
        "curl", "--silent", "--unix-socket", f"{node.state_dir}/health.sock", "localhost/readyz?verbose"
    ).stdout


@pytest.mark.parametrize("killed", ["rootlesskit", "rootlesskit's child", "nixlet", "containerd", "slirp4netns"])
def test_whichever_is_killed_nothing_stays(newest: users.Node, image: storeimages.StoreImage, killed: str) -> None:
    newest.start()
    user = newest.user
    user.ok("run", "-d", "--name", "one", image.reference, "--", "/bin/sleep", "1000")
    process = newest.process
    assert process is not None
    if killed == "rootlesskit":
        pid = process.pid
    elif killed == "rootlesskit's child":
        pid = newest.child_of(process.pid, "exe")
    elif killed == "nixlet":
        pid = newest.child_of(newest.child_of(process.pid, "exe"), "python")
    else:
        pid = newest.pid_of(killed)
    os.kill(pid, signal.SIGKILL)
    if killed == "containerd":
        # It is started again, and the pod goes on.
        nodes.until(lambda: newest.pid_of("containerd") not in {0, pid}, "containerd is started again")
        nodes.until(lambda: user.nixlet("exec", "one", "/bin/true").returncode == 0, "the pod is there")
        assert newest.stop() == 0
    elif killed == "slirp4netns":
        # Pods go on, without a way out, and the node says so.
        nodes.until(lambda: "[-]slirp4netns" in ready(newest), "the node isn't ready")
        assert user.ok("exec", "one", "/bin/echo", "hello") == "hello\n"
        assert newest.stop() == 0
    else:
        assert process.wait(60) != 0
    nodes.until(lambda: user.processes() == {}, f"all processes have ended: {user.processes()}")
    assert mounts.below(str(user.base)) == []
    # The next one starts, and knows of what was there.
    newest.start()
    assert "one" in user.ok("ps", "-a")
    assert user.ok("run", "--rm", image.reference, "--", "/bin/echo", "again") == "again\n"
    user.ok("rm", "-f", "one")
    assert newest.stop() == 0


def test_uninstalling_leaves_nothing(newest: users.Node, image: storeimages.StoreImage) -> None:
    newest.start()
    user = newest.user
    user.ok("run", "-d", image.reference, "--", "/bin/sleep", "1000")
    refused = user.nixlet("uninstall", "--yes")
    assert (refused.returncode, "the node is running" in refused.stderr or "runs already" in refused.stderr) == (
        125,
        True,
    )
    assert newest.stop() == 0
    assert str(newest.data_dir / "agent/containerd") in user.ok("uninstall")
    assert "Removed:" in user.ok("uninstall", "--yes")
    assert not newest.data_dir.exists()
    assert list(user.runtime.iterdir()) == []
    assert user.processes() == {}


def test_a_second_one_is_refused(newest: users.Node) -> None:
    newest.start()
    done = newest.user.nixlet("server", "--rootless")
    assert (done.returncode, done.stderr.splitlines()[0]) == (125, f"error: a node runs already in {newest.state_dir}")


def test_root_needs_none() -> None:
    argv = [sys.executable, "-m", "nixlet", "server", "--rootless"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        2,
        "error: --rootless is for ordinary users: root's node needs no user namespace",
    )


def test_an_ordinary_user_is_told_of_it(user: users.User) -> None:
    done = user.nixlet("server")
    assert done.returncode == 125
    assert done.stderr.splitlines() == [
        "error: a node needs root rights (CAP_SYS_ADMIN)",
        "hint: run it as root: sudo nixlet server; or have one of your own: nixlet server --rootless",
    ]


def test_a_containerd_that_can_not_bind_is_refused_in_words(user: users.User) -> None:
    node = users.Node(user, "--containerd", str(parts.containerd("1.6.20")))
    assert node.launch().wait(60) == 125
    said = node.log.read_text()
    assert (
        "error: containerd 1.6.20 can't bind store paths into containers, and an ordinary user's node has no other way\n"
        in said
    )
    assert "hint: use containerd 1.7 or later: --containerd\n" in said
    assert "Traceback" not in said


def test_without_a_daemon_of_nix_it_says_so(user: users.User) -> None:
    node = users.Node(user, containerd=parts.CONTAINERDS[-1])
    daemon = user.environment.pop("NIX_REMOTE")
    user.environment["NIX_DAEMON_SOCKET_PATH"] = "/nowhere/nix.sock"
    try:
        assert node.launch().wait(60) == 125
    finally:
        del user.environment["NIX_DAEMON_SOCKET_PATH"]
        user.environment["NIX_REMOTE"] = daemon
    said = node.log.read_text()
    assert "no daemon serves /nowhere/nix.sock, and the store directory /nix/store" in said
    assert "start the Nix daemon (systemctl start nix-daemon.socket)" in said


def findings(user: users.User) -> tuple[int, dict[str, dict[str, str]]]:
    done = user.nixlet("rootless", "check", "--output", "json")
    listed = json.loads(done.stdout)
    # doctor says the same.
    told = json.loads(user.nixlet("doctor", "--rootless", "--json").stdout)
    assert [each["name"] for each in told] == [each["name"] for each in listed]
    return done.returncode, {each["name"]: each for each in listed if each["group"] in {"rootless", "Nix"}}


@pytest.fixture
def with_containerd(user: users.User) -> Iterator[users.User]:
    """A user whose containerd is one that can bind."""
    user.environment["NIXLET_CONTAINERD"] = str(parts.containerd(parts.CONTAINERDS[-1]))
    yield user
    del user.environment["NIXLET_CONTAINERD"]


def test_what_a_machine_has_for_it(with_containerd: users.User) -> None:
    status, found = findings(with_containerd)
    # (nobody has started a service of theirs)
    worse = {name for name, each in found.items() if each["status"] != "ok"}
    assert (status, worse - {"linger"}) == (0, {"cgroups"}), found
    assert found["bind mounts"]["evidence"] == "containers see closures through them"
    assert "through a daemon" in found["store"]["evidence"]
    assert not with_containerd.processes()


def test_the_readme(with_containerd: users.User, hello: str) -> None:
    check, server = readme.commands(readme.blocks("sh", "Without root")[0])
    assert server.split() == ["nixlet", "server", "--rootless"]
    path = f"{Path(sys.executable).parent}:{with_containerd.environment['PATH']}"
    assert with_containerd.run("env", f"PATH={path}", "sh", "-c", check).returncode == 0
    node = users.Node(with_containerd)
    node.arguments = []
    node.start()
    assert with_containerd.ok("run", "--rm", hello) == "Hello, world!\n"
    assert node.stop() == 0
    with_containerd.ok("uninstall", "--yes")


def test_what_is_missing_is_told_with_its_command(with_containerd: users.User) -> None:
    user = with_containerd
    file = user.base / "etc/subuid"
    before = file.read_text()
    file.write_text("")
    user.as_root("chmod", "600", "/dev/net/tun")
    try:
        status, found = findings(user)
        refused = user.nixlet("server", "--rootless")
    finally:
        file.write_text(before)
        user.as_root("chmod", "666", "/dev/net/tun")
    assert status == 1
    assert found["subuid"]["status"] == found["tun"]["status"] == found["bind mounts"]["status"] == "missing"
    assert found["subuid"]["evidence"] == f"{user.name} has no IDs in /etc/subuid, and containers need 65536"
    assert found["subuid"]["remedy"].startswith(f"sudo usermod --add-subuids 100000-165535 {user.name}")
    assert found["tun"]["remedy"] == "sudo chmod 0666 /dev/net/tun"
    assert found["subgid"]["status"] == "ok"
    # A start says the same, of what comes first.
    assert refused.returncode == 125
    assert refused.stderr.splitlines()[0] == f"error: {found['subuid']['evidence']}"
    assert not (user.runtime / "nixlet").exists()


def test_settings_that_can_not_be_there(user: users.User) -> None:
    for flags in (["--kubernetes", "yes"], ["--container-runtime-endpoint", "/run/c.sock"]):
        done = user.nixlet("server", "--rootless", *flags)
        assert (done.returncode, "can't be with rootless" in done.stderr) == (2, True), done.stderr


def test_files_of_roots_are_obeyed_and_a_strangers_are_not(newest: users.Node) -> None:
    user = newest.user
    of_root, strangers = user.base / "registries.yaml", user.images / "registries.yaml"
    for file in (of_root, strangers):
        file.write_text('mirrors:\n  example.com:\n    endpoint: ["https://mirror.example.com"]\n')
    os.chown(strangers, 65534, 65534)
    newest.arguments += ["--private-registry", str(of_root)]
    newest.start()
    certs = newest.data_dir / "agent/etc/containerd/certs.d/example.com/hosts.toml"
    assert "mirror.example.com" in certs.read_text()
    assert newest.stop() == 0
    newest.arguments += ["--private-registry", str(strangers)]
    assert newest.launch().wait(60) == 125
    assert f"{strangers} belongs to another user, who could have the node run anything" in newest.log.read_text()


def test_everyday_verbs(newest: users.Node, image: storeimages.StoreImage) -> None:
    newest.start()
    user = newest.user
    user.ok("run", "-d", "--name", "one", image.reference, "--", "/bin/sh", "-c", "echo started; exec sleep 1000")
    nodes.until(lambda: user.ok("logs", "one") == "started\n", "its output is in its log")
    assert user.ok("exec", "-i", "one", "/bin/cat", stdin=b"through a pipe\n") == "through a pipe\n"
    inside = shlex.join([sys.executable, "-m", "nixlet", "exec", "-it", "one", "/bin/busybox", "tty"])
    assert "/dev/pts/0" in user.run("script", "-qec", inside, "/dev/null").stdout
    assert "one" in user.ok("stats", "--no-stream")
    # It has a network, and a way to the names of its own node.
    assert "inet 10.63." in user.ok("exec", "one", "/bin/busybox", "ip", "address", "show", "eth0")
    assert "nameserver 10.0.2.3" in user.ok("exec", "one", "/bin/cat", "/etc/resolv.conf")
    # What is the user's can be mounted, and nothing else can be read.
    (user.home / "shared").mkdir()
    os.chown(user.home / "shared", user.uid, user.uid)
    closed = user.base / "closed"
    closed.mkdir(mode=0o700)
    mounted = [
        "run",
        "--rm",
        "-v",
        f"{user.home}/shared:/here",
        "-v",
        f"{closed}:/closed:ro",
        image.reference,
        "--",
        "/bin/sh",
        "-c",
    ]
    said = user.nixlet(*mounted, "echo written >/here/file; ls /closed")
    assert (said.returncode, "Permission denied" in said.stderr) == (1, True), said
    assert (user.home / "shared/file").stat().st_uid == user.uid
    # doctor knows the node that runs.
    listed = json.loads(user.nixlet("doctor", "--rootless", "--json").stdout)
    sockets = {each["name"]: each["evidence"] for each in listed if each["group"] == "sockets"}
    assert all("is served by the node that runs" in each for each in sockets.values()), sockets
    assert user.ok("stop", "one") == "one\n"
    assert newest.stop() == 0


def test_a_home_in_a_directory_of_which_the_node_has_a_copy(newest: users.Node, hello: str) -> None:
    user = newest.user
    home = Path(tempfile.mkdtemp(prefix="nixlet-user-", dir="/var/lib"))
    home.chmod(0o755)
    user.own(home / "ada")
    user.environment["XDG_DATA_HOME"] = str(home / "ada/data")
    try:
        newest.start()
        assert user.ok("run", "--rm", hello) == "Hello, world!\n"
        root = home / "ada/data/nixlet/agent/containerd/io.containerd.snapshotter.v1.nix/gcroots"
        assert list(root.rglob("*-closure-info*")) or list(root.rglob("*-hello*"))
        assert newest.stop() == 0
        user.ok("uninstall", "--yes")
        assert not (home / "ada/data/nixlet").exists()
    finally:
        del user.environment["XDG_DATA_HOME"]
        user.end_processes()
        subprocess.run(["rm", "-rf", str(home)], check=True)


def test_the_node_is_a_service_of_its_users(older: users.Node, hello: str) -> None:
    user = older.user
    own = user.home / ".config/nixlet"
    user.own(user.home / ".config")
    user.own(own)
    (own / "config.yaml").write_text(f"containerd: {parts.containerd('1.7.35')}\n")
    (own / "environment").write_text(f"NIX_REMOTE={user.environment['NIX_REMOTE']}\nNIX_CONFIG=substituters =\n")
    for file in own.iterdir():
        os.chown(file, user.uid, user.uid)
    unit = user.home / ".config/systemd/user/nixlet.service"

    def show(name: str) -> str:
        return user.run("systemctl", "--user", "show", "--property", name, "--value", "nixlet").stdout.strip()

    with user.systemd():
        # Type=notify: it is ready when this returns.
        assert user.ok("rootless", "setup") == f"{unit}\n"
        assert user.ok("run", "--rm", hello) == "Hello, world!\n"
        first = show("MainPID")
        os.kill(int(first), signal.SIGKILL)
        nodes.until(lambda: show("MainPID") not in {first, "0"}, "it is started again")
        nodes.until(lambda: show("ActiveState") == "active", "it is ready again")
        assert user.ok("run", "--rm", hello) == "Hello, world!\n"
        # Once more, as after an upgrade.
        assert user.ok("rootless", "setup") == f"{unit}\n"
        assert user.ok("rootless", "uninstall") == f"Removed: {unit}\n"
        assert show("ActiveState") == "inactive"
        assert not {
            name for name in user.processes().values() if name in {"rootlesskit", "exe", "slirp4netns", "containerd"}
        }
        assert user.ok("rootless", "uninstall").startswith("Nothing is to be done")
        assert "Removed:" in user.ok("uninstall", "--yes")
    assert user.processes() == {}


def test_a_unit_of_a_person_s_own_stays(user: users.User) -> None:
    unit = user.home / ".config/systemd/user/nixlet.service"
    user.own(unit.parent)
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    for verb in ("setup", "uninstall"):
        done = user.nixlet("rootless", verb)
        assert (done.returncode, "is not nixlet's, and stays as it is" in done.stderr) == (125, True)
    assert unit.read_text() == "[Service]\nExecStart=/bin/true\n"
    unit.unlink()
    # Without a manager it can be written all the same.
    assert user.ok("rootless", "setup", "--no-start") == f"{unit}\n"
    assert "NotifyAccess=all" in unit.read_text()
