"""install.sh on a bare Debian that systemd runs: installing, upgrading, going back, taking away."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import kubernetes, machines, nodes, parts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
RUN = "src/nixlet/node/lifecycle/server.py"
BEGIN = "    limits.raise_open_files()\n    stop = signals.watched()\n"

#: Versions that start and don't get ready: one says why and ends, one hangs.
BAD = {
    "0.8.1": '    raise errors.UnavailableError("this version is a bad one")\n' + BEGIN,
    "0.8.2": BEGIN + "    await stop.requested.wait()\n",
}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, ordinary: Path) -> Iterator[machines.Machine]:
    """A bare machine, with sources of several versions in /src; 1.0.0 brings the packages that are missing."""
    with machines.booted(tmp_path_factory.mktemp("machine")) as made:
        for version in ("1.0.0", "1.1.0", "1.2.0"):
            machines.source(made.root / "src" / version, version)
        for version, instead in BAD.items():
            machines.source(made.root / "src" / version, version, edits={RUN: (BEGIN, instead)})
        (made.root / "ordinary.tar").write_bytes(ordinary.read_bytes())
        yield made


def install(
    machine: machines.Machine, version: str, *arguments: str, **variables: str
) -> "subprocess.CompletedProcess[str]":
    return machine.run(f"/src/{version}/install.sh", *arguments, variables=variables)


@pytest.fixture
def installed(machine: machines.Machine) -> machines.Machine:
    """The machine with 1.0.0, ready."""
    done = install(machine, "1.0.0", "server", INSTALL_NIXLET_FORCE_RESTART="true")
    assert done.returncode == 0, done.stderr
    assert runs(machine) == "1.0.0"
    return machine


def runs(machine: machines.Machine) -> str:
    """The version of the node that runs."""
    node = json.loads(machine.ok("nixlet", "version", "--output", "json"))["node"]
    return str(node and node["version"])


RUN_SLEEPER = ("nixlet", "run", "-d")
SLEEPER = ("localhost/ordinary:1", "--", "/bin/sleep", "1000")


def sleeper(machine: machines.Machine) -> int:
    """The process of the container of RUN_SLEEPER."""
    script = (
        'cd /proc; for pid in [0-9]*; do [ "$(tr "\\0" " " <$pid/cmdline)" != "/bin/sleep 1000 " ] || echo $pid; done'
    )
    (pid,) = machine.ok("sh", "-c", script).split()
    return int(pid)


def until(holds: Callable[[], object], what: str) -> None:
    for _ in range(1200):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError(what)


def traces(machine: machines.Machine) -> list[str]:
    """What there is in the machine that has nixlet's name, or stands where it puts things."""
    find = "find / -xdev \\( -path /src -o -path /proc \\) -prune -o -iname '*nixlet*' -print"
    places = "find /opt /usr/local -mindepth 1 -newer /debs/Packages ! -type d"
    return sorted({*machine.ok("sh", "-c", find).split(), *machine.ok("sh", "-c", places).split()})


def cgroups_of(machine: machines.Machine, pid: int) -> set[str]:
    """The cgroups that a process of a machine's is in, each once, the machine's own ones left out."""
    lines = machine.ok("cat", f"/proc/{pid}/cgroup").splitlines()
    return {line.partition(":")[2].partition(":")[2] for line in lines} - {"/"}


def scopes(machine: machines.Machine) -> set[str]:
    """The containers whose cgroups are systemd's."""
    listed = machine.ok("systemctl", "list-units", "--type=scope", "--no-legend", "--plain")
    return set(re.findall(r"cri-containerd-([0-9a-f]{64})\.scope", listed))


def test_what_is_missing_is_said_before_anything_changes(machine: machines.Machine) -> None:
    machine.ok("sh", "-c", "mv /usr/bin/runc /usr/bin/runc.away 2>/dev/null || true")
    try:
        before = traces(machine)
        done = install(machine, "1.0.0", INSTALL_NIXLET_SKIP_PACKAGES="true", INSTALL_NIXLET_NAME="other")
        assert done.returncode == 125
        assert done.stderr.startswith("error: this machine lacks what a node needs:\n")
        assert re.search(r"^    runc +starts each container$", done.stderr, re.MULTILINE)
        assert re.search(r"^hint: apt-get install .*runc", done.stderr, re.MULTILINE)
        assert traces(machine) == before
    finally:
        machine.ok("sh", "-c", "mv /usr/bin/runc.away /usr/bin/runc 2>/dev/null || true")


def test_a_bare_machine_becomes_a_node(installed: machines.Machine) -> None:
    for package in ("containerd", "runc", "nix-bin", "containernetworking-plugins", "python3-venv"):
        status = installed.ok("dpkg-query", "-W", "-f", "${db:Status-Status}", package)
        assert status == "installed", package
    # The system's own containerd was not brought up.
    assert installed.show("containerd.service", "ActiveState") == "inactive"
    assert os.readlink(installed.root / "usr/local/bin/nixlet") == "/opt/nixlet/1.0.0/bin/nixlet"
    assert installed.show("nixlet", "UnitFileState") == "enabled"
    assert installed.show("nixlet", "Type") == "notify"
    assert installed.show("nixlet", "KillMode") == "process"
    assert installed.show("nixlet", "Delegate") == "yes"
    # Nothing compiles itself when it starts.
    sources = len(list((installed.root / "opt/nixlet/1.0.0/lib").rglob("nixlet/**/*.py")))
    assert sources > 100
    assert len(list((installed.root / "opt/nixlet/1.0.0/lib").rglob("nixlet/**/*.pyc"))) == sources
    # The example says nothing, and is a node's configuration.
    assert installed.ok("nixlet", "server", "--show-config") == installed.ok("nixlet", "server", "--config", "/dev/null", "--show-config")  # fmt: skip
    for shell in (
        "bash-completion/completions/nixlet",
        "zsh/site-functions/_nixlet",
        "fish/vendor_completions.d/nixlet.fish",
    ):
        assert "_NIXLET_COMPLETE" in (installed.root / "usr/local/share" / shell).read_text()


def test_once_more_changes_nothing(installed: machines.Machine) -> None:
    config = installed.root / "etc/nixlet/config.yaml"
    example = config.read_text()
    config.write_text("debug: true\n")
    try:
        pid = installed.show("nixlet", "MainPID")
        inode = (installed.root / "etc/systemd/system/nixlet.service").stat().st_ino
        done = install(installed, "1.0.0")
        assert done.returncode == 0, done.stderr
        assert "nothing has changed" in done.stderr
        assert installed.show("nixlet", "MainPID") == pid
        assert (installed.root / "etc/systemd/system/nixlet.service").stat().st_ino == inode
        assert config.read_text() == "debug: true\n"
        assert sorted(path.name for path in (installed.root / "opt/nixlet").glob("*.*.*")) == ["1.0.0"]
    finally:
        config.write_text(example)


def test_an_upgrade_keeps_pods_settings_and_tokens(installed: machines.Machine) -> None:
    given = {"CONTAINERD_X_NOTE": 'in "quotes" $and', "HTTPS_PROXY": "http://proxy.example:3128"}
    done = install(installed, "1.0.0", "server", "--airgap-extra-registry", "a b.example", **given)
    assert done.returncode != 0
    assert "nothing was changed" in done.stderr
    assert runs(installed) == "1.0.0"
    done = install(installed, "1.0.0", "server", "--airgap-extra-registry", "mirror.example", **given)
    assert done.returncode == 0, done.stderr
    variables = installed.root / "etc/systemd/system/nixlet.service.env"
    assert stat.S_IMODE(variables.stat().st_mode) == 0o600
    told = installed.ok("sh", "-c", f"tr '\\0' '\\n' </proc/{installed.show('nixlet', 'MainPID')}/environ").splitlines()
    assert {f"{name}={value}" for name, value in given.items()} <= set(told)
    installed.ok("nixlet", "image", "load", "/ordinary.tar")
    installed.ok(*RUN_SLEEPER, "--name", "stays", "--network", "none", *SLEEPER)
    try:
        pid = sleeper(installed)
        born = installed.ok("cut", "-d", " ", "-f", "22", f"/proc/{pid}/stat")
        # Without a word on what is to be started, and without anything from elsewhere: the requirements are the same.
        done = install(installed, "1.1.0", PIP_FIND_LINKS="")
        assert done.returncode == 0, done.stderr
        assert runs(installed) == "1.1.0"
        assert installed.ok("cut", "-d", " ", "-f", "22", f"/proc/{pid}/stat") == born
        assert "stays" in installed.ok("nixlet", "ps")
        assert installed.ok("nixlet", "exec", "stays", "/bin/echo", "alive") == "alive\n"
        assert "--airgap-extra-registry mirror.example" in installed.show("nixlet", "ExecStart")
        assert variables.read_text() == (
            'CONTAINERD_X_NOTE="in \\"quotes\\" \\$and"\nHTTPS_PROXY="http://proxy.example:3128"\n'
        )
        # The last one before stays, others go.
        done = install(installed, "1.2.0", CONTAINERD_X_NOTE="")
        assert done.returncode == 0, done.stderr
        assert runs(installed) == "1.2.0"
        assert sorted(path.name for path in (installed.root / "opt/nixlet").glob("*.*.*")) == ["1.1.0", "1.2.0"]
        assert variables.read_text() == 'HTTPS_PROXY="http://proxy.example:3128"\n'
        # Ended by the script for that, which leaves the rest; systemd brings the node back, and the pod is one that has ended.
        installed.ok("nixlet-killall.sh")
        assert installed.run("test", "-e", f"/proc/{pid}").returncode == 1
        installed.ok("systemctl", "start", "nixlet")
        assert "stays" in installed.ok("nixlet", "ps", "-a")
        assert "stays" not in installed.ok("nixlet", "ps")
    finally:
        installed.run("nixlet", "rm", "-f", "stays")


@pytest.mark.parametrize("bad", BAD)
def test_a_version_that_does_not_get_ready_goes_back(installed: machines.Machine, bad: str) -> None:
    unit = installed.root / "etc/systemd/system/nixlet.service"
    before = unit.read_text()
    done = install(installed, bad, "server", "--debug", INSTALL_NIXLET_READY_SECONDS="10")
    assert done.returncode == 125
    assert f"error: nixlet {bad} did not get ready as nixlet" in done.stderr
    assert "what was there before is in force again, and ready (/opt/nixlet/1.0.0/bin/nixlet)" in done.stderr
    if bad == "0.8.1":
        assert "this version is a bad one" in done.stderr
    assert runs(installed) == "1.0.0"
    assert unit.read_text() == before
    # It is no version to go back to, and goes with the next one that works.
    done = install(installed, "1.1.0")
    assert done.returncode == 0, done.stderr
    assert not (installed.root / "opt/nixlet" / bad).exists()
    assert (installed.root / "opt/nixlet/1.0.0").exists()


def test_who_went_back_by_hand_stays_there_when_a_later_version_is_bad(installed: machines.Machine) -> None:
    """docs/guides/upgrading.md, its last lines."""
    done = install(installed, "1.1.0")
    assert done.returncode == 0, done.stderr
    guide = (ROOT / "docs/guides/upgrading.md").read_text()
    (link,) = re.findall(r"`(ln -sfn [^`]+)`", guide)
    installed.ok("sh", "-c", link.replace("VERSION", "1.0.0"))
    installed.ok("systemctl", "restart", "nixlet")
    assert runs(installed) == "1.0.0"
    done = install(installed, "0.8.1")
    assert done.returncode == 125
    assert "in force again, and ready (/opt/nixlet/1.0.0/bin/nixlet)" in done.stderr
    assert runs(installed) == "1.0.0"


def within(machine: machines.Machine, process: "subprocess.Popen[str]") -> int:
    """The installer's process, as seen from here: what nsenter started in the machine."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else process.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["building", "starting"])
def test_a_run_that_is_cut_off_leaves_the_old_or_the_new(
    installed: machines.Machine, number: signal.Signals, moment: str
) -> None:
    installed.ok("rm", "-rf", "/opt/nixlet/1.1.0")
    place = installed.root / ("opt/nixlet/1.1.0/bin" if moment == "building" else "opt/nixlet/.before")
    with installed.popen("/src/1.1.0/install.sh") as process:
        until(place.exists, "it is on its way")
        os.kill(within(installed, process), number)
        _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    if number == signal.SIGTERM:
        assert not place.exists()
        assert ("taking back" in said) == (moment == "starting")
    # Either of the two is a whole one.
    until(lambda: installed.show("nixlet", "ActiveState") == "active", "the node is there")
    now = runs(installed)
    assert now in {"1.0.0", "1.1.0"}
    assert installed.ok("nixlet", "version").startswith(("nixlet 1.0.0", "nixlet 1.1.0"))
    if moment == "building" or number == signal.SIGTERM:
        assert now == "1.0.0"
    done = install(installed, "1.1.0")
    assert done.returncode == 0, done.stderr
    assert runs(installed) == "1.1.0"
    assert not (installed.root / "opt/nixlet/.before").exists()


def test_a_version_that_hangs_makes_way_when_its_installation_is_cut_off(installed: machines.Machine) -> None:
    """It is neither up nor down by then, and would be waited for without an end."""
    with installed.popen("/src/0.8.2/install.sh") as process:
        until(lambda: installed.show("nixlet", "ActiveState") == "activating", "it is on its way")
        os.kill(within(installed, process), signal.SIGTERM)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 143, said
    until(lambda: installed.show("nixlet", "ActiveState") == "active", "the node is there")
    assert runs(installed) == "1.0.0"


def test_an_installation_goes_on_when_nobody_reads_what_it_says(installed: machines.Machine) -> None:
    installed.ok("rm", "-rf", "/opt/nixlet/1.1.0")
    said = installed.ok("sh", "-c", "/src/1.1.0/install.sh 2>&1 | head -n 1")
    assert said == "==> Installing nixlet 1.1.0 into /opt/nixlet/1.1.0\n"
    assert runs(installed) == "1.1.0"
    assert not (installed.root / "opt/nixlet/.before").exists()


def test_a_pipe_is_told_where_nixlet_comes_from(installed: machines.Machine) -> None:
    script = (ROOT / "install.sh").read_text()
    done = installed.run("sh", "-s", "-", "server", stdin=script)
    assert done.returncode == 125
    assert done.stderr.startswith(
        "error: nothing says where nixlet is to come from\nhint: name a directory, an archive or"
    )
    installed.ok("tar", "-C", "/src", "-czf", "/src/nixlet-1.1.0.tar.gz", "1.1.0")
    named = {"INSTALL_NIXLET_SOURCE": "/src/nixlet-1.1.0.tar.gz"}
    wrong = {**named, "INSTALL_NIXLET_SHA256": "0" * 64}
    done = installed.run("sh", "-s", "-", "server", "--debug", stdin=script, variables=wrong)
    assert done.returncode == 125
    assert "has the checksum" in done.stderr
    assert runs(installed) == "1.0.0"
    named["INSTALL_NIXLET_SHA256"] = installed.ok("sha256sum", "/src/nixlet-1.1.0.tar.gz").split()[0]
    done = installed.run(
        "sh",
        "-s",
        "-",
        "server",
        "--debug",
        stdin=script,
        variables={**named, "INSTALL_NIXLET_EXEC": "--selinux=false"},
    )
    assert done.returncode == 0, done.stderr
    assert runs(installed) == "1.1.0"
    assert "nixlet --selinux=false" not in installed.show("nixlet", "ExecStart")
    assert "--selinux=false" in installed.show("nixlet", "ExecStart")
    assert [name for name in installed.ok("ls", "/tmp").split() if not name.startswith("systemd-private-")] == []


#: A service of its own, that is not started, at places of its own.
ASIDE = {
    "INSTALL_NIXLET_SKIP_ENABLE": "true",
    "INSTALL_NIXLET_NAME": "aside",
    "INSTALL_NIXLET_OPT_DIR": "/aside/opt",
    "INSTALL_NIXLET_BIN_DIR": "/aside/bin",
    "INSTALL_NIXLET_SYSTEMD_DIR": "/aside/units",
    "INSTALL_NIXLET_CONFIG_DIR": "/aside/etc",
    "INSTALL_NIXLET_SHARE_DIR": "/aside/share",
}


@pytest.mark.parametrize("umask", ["000", "077"])
def test_modes_do_not_depend_on_the_umask(installed: machines.Machine, umask: str) -> None:
    variables = {**ASIDE, "NIXLET_DATA_DIR": "/aside/data"}
    try:
        done = installed.run("/src/1.0.0/install.sh", "server", umask=umask, variables=variables)
        assert done.returncode == 0, done.stderr
        assert installed.show("nixlet-aside", "LoadState") == "not-found"
        listed = installed.ok("find", "/aside", "-printf", "%m %y %U %p\n").splitlines()
        modes = {line.split(" ", 3)[3]: line.split(" ")[0] for line in listed if line.split(" ")[1] != "l"}
        assert {line.split(" ")[2] for line in listed} == {"0"}
        secret = {path for path, mode in modes.items() if mode == "600"}
        assert secret == {"/aside/units/nixlet-aside.service.env", "/aside/etc/config.yaml"}
        assert {mode for path, mode in modes.items() if path not in secret} == {"755", "644"}
        unit = (installed.root / "aside/units/nixlet-aside.service").read_text()
        assert "\nEnvironment=NIXLET_CONFIG_FILE=/aside/etc/config.yaml\n" in unit
        # With the script for that all of it goes, and nothing else.
        installed.ok("sh", "-c", "mkdir -p /aside/opt/mine; touch /aside/opt/mine/pyvenv.cfg")
        done = installed.run("/aside/bin/nixlet-aside-uninstall.sh")
        assert done.returncode == 0, done.stderr
        assert installed.ok("find", "/aside", "!", "-type", "d").split() == ["/aside/opt/mine/pyvenv.cfg"]
        assert modes["/aside/units/nixlet-aside.service"] == "644"
        assert modes["/aside/bin/nixlet-aside-uninstall.sh"] == "755"
    finally:
        installed.ok("rm", "-rf", "/aside")


def test_without_a_network_from_a_directory(installed: machines.Machine) -> None:
    """As scripts/offline makes it."""
    installed.ok("sh", "-c", "mkdir /offline; touch /offline/mine")
    done = installed.run("/src/1.0.0/scripts/offline", "/offline")
    assert done.returncode == 125
    assert "/offline is not empty, and not of this program's making" in done.stderr
    installed.ok("rm", "/offline/mine")
    # What a later version has no more must not stay.
    installed.ok("sh", "-c", "mkdir -p /offline/src/nixlet; touch /offline/.nixlet-offline /offline/src/nixlet/gone.py")
    installed.ok("/src/1.0.0/scripts/offline", "/offline", umask="077")
    assert not (installed.root / "offline/src/nixlet/gone.py").exists()
    installed.ok("sh", "-c", "mv /offline/wheels/*.whl /tmp")
    variables = {**ASIDE, "INSTALL_NIXLET_SKIP_DOWNLOAD": "true", "PIP_FIND_LINKS": "", "PIP_NO_INDEX": ""}
    try:
        done = installed.run("/offline/install.sh", variables=variables)
        assert done.returncode == 125
        assert "could not install requirements/runtime.txt from /offline/wheels" in done.stderr
        assert not (installed.root / "aside/bin").exists()
        installed.ok("sh", "-c", "mv /tmp/*.whl /offline/wheels")
        done = installed.run("/offline/install.sh", variables=variables)
        assert done.returncode == 0, done.stderr
        assert installed.ok("/aside/bin/nixlet", "version").startswith("nixlet 1.0.0 ")
        installed.ok("rm", "-r", "/offline/wheels")
        # An upgrade with the same requirements has them already; here they are others.
        installed.ok("sed", "-i", "s/1[.]0[.]0/1.0.1/", "/offline/src/nixlet/__init__.py")
        installed.ok("sh", "-c", "echo '# more' >>/offline/requirements/runtime.txt")
        done = installed.run("/offline/install.sh", variables=variables)
        assert done.returncode == 125
        assert "has no directory wheels" in done.stderr
    finally:
        installed.ok("rm", "-rf", "/aside", "/offline")


def test_without_systemd(installed: machines.Machine) -> None:
    """As in a container, or in the image of a machine that is made."""
    # A directory that somebody else made is as they made it.
    installed.ok("mkdir", "-p", "--mode=700", "/aside/opt")
    hidden = "mount -t tmpfs none /run/systemd; exec /src/1.0.0/install.sh server --debug"
    variables = {**ASIDE, "INSTALL_NIXLET_SKIP_ENABLE": "", "NIXLET_DATA_DIR": "/aside/data"}
    try:
        done = installed.run("unshare", "--mount", "sh", "-ec", hidden, variables=variables)
        assert done.returncode == 0, done.stderr
        assert "systemd does not run here. Start it with: /aside/bin/nixlet server --debug\n" in done.stderr
        assert installed.ok("stat", "--format=%a", "/aside/opt") == "700\n"
    finally:
        installed.ok("rm", "-rf", "/aside")


def test_taken_away_nothing_is_left(installed: machines.Machine) -> None:
    installed.ok("nixlet", "image", "load", "/ordinary.tar")
    installed.ok(*RUN_SLEEPER, "--name", "goes", *SLEEPER)
    pid = sleeper(installed)
    done = installed.run("nixlet-uninstall.sh")
    assert done.returncode == 0, done.stderr
    assert "apt-get purge" in done.stdout
    assert installed.run("test", "-e", f"/proc/{pid}").returncode == 1
    assert traces(installed) == []
    assert installed.show("nixlet", "LoadState") == "not-found"
    assert installed.ok("sh", "-c", "ls /run/netns 2>/dev/null || true") == ""
    assert "nixlet" not in installed.ok("cat", "/proc/self/mounts")
    assert "nixlet0" not in installed.ok("ls", "/sys/class/net")


def test_systemd_makes_the_cgroups(installed: machines.Machine) -> None:
    """A pod goes on in what it has when the node changes its mind, and can be entered and removed."""
    config = installed.ok("sh", "-c", "ls /var/lib/nixlet/agent/etc/containerd/config*.toml").strip()
    assert "SystemdCgroup = true" in installed.ok("cat", config)
    installed.ok("nixlet", "image", "load", "/ordinary.tar")
    container = installed.ok(*RUN_SLEEPER, "--name", "old", *SLEEPER).strip()
    pid = sleeper(installed)
    there = {f"/system.slice/cri-containerd-{container}.scope"}
    assert cgroups_of(installed, pid) == there
    assert container in scopes(installed)
    (line,) = installed.ok("nixlet", "stats", "--no-stream").splitlines()[1:]
    assert re.search(r" [1-9][0-9.]*[KM]iB / ", line), line
    # A line of a person's, as they would write it for the containerd of this machine.
    version = re.search(r"^version = (\d)$", installed.ok("cat", config), re.MULTILINE)
    assert version is not None
    plugin = "io.containerd.grpc.v1.cri" if version[1] == "2" else "io.containerd.cri.v1.runtime"
    said = f"version = {version[1]}\n[plugins.'{plugin}'.containerd.runtimes.runc.options]\nSystemdCgroup = false\n"
    installed.ok("sh", "-c", f"mkdir -p {config}.d && cat >{config}.d/cgroups.toml", stdin=said)
    try:
        installed.ok("systemctl", "restart", "nixlet")
        assert sleeper(installed) == pid
        assert installed.ok("nixlet", "exec", "old", "--", "/bin/sh", "-c", "echo entered") == "entered\n"
        other = installed.ok("nixlet", "run", "-d", "--name", "other", SLEEPER[0], "--", "/bin/sleep", "999").strip()
        assert other not in scopes(installed)
        assert cgroups_of(installed, pid) == there
    finally:
        installed.ok("rm", f"{config}.d/cgroups.toml")
        installed.ok("systemctl", "restart", "nixlet")
    assert cgroups_of(installed, pid) == there
    # (on cgroups of version 1 systemd moves what it hasn't made: nothing is said of the cgroups that "other" is in)
    listed = installed.ok("nixlet", "ps")
    for name in ("old", "other"):
        assert re.search(rf" running .* {name} ", listed), listed
        installed.ok("nixlet", "stop", "--time", "1", name)
        installed.ok("nixlet", "rm", name)
    assert scopes(installed) == set()


def test_a_kubelet_of_k3ss(installed: machines.Machine) -> None:
    """docs/guides/k3s.md, but for k3s itself: the kubelet that is in it, told what k3s tells it."""
    guide = (ROOT / "docs/guides/k3s.md").read_text()
    (flags,) = re.findall(r"^ *\./install\.sh (server .*)$", guide, re.MULTILINE)
    done = install(installed, "1.0.0", *flags.split())
    assert done.returncode == 0, done.stderr
    said = dict(re.findall(r"--(container-runtime-endpoint|image-service-endpoint) (\S+)", guide))
    settings = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": said["container-runtime-endpoint"],
        "imageServiceEndpoint": said["image-service-endpoint"],
        # k3s says cgroupfs of a containerd that isn't its own, unless it is told.
        "cgroupDriver": dict(re.findall(r"--kubelet-arg (cgroup-driver)=(\w+)", guide)).get(
            "cgroup-driver", "cgroupfs"
        ),
        "staticPodPath": "/src/kubelet/pods",
        "enableServer": False,
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "failCgroupV1": False,
        "failSwapOn": False,
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "1Mi"},
    }
    (installed.root / "src/kubelet/pods").mkdir(parents=True)
    (installed.root / "src/kubelet/config").write_text(json.dumps(settings))
    shutil.copy(parts.kubernetes() / "kubelet", installed.root / "src/kubelet")
    pod = nodes.manifest("k3s", SLEEPER[0], command=SLEEPER[2:], container={"imagePullPolicy": "Never"})
    (installed.root / "src/kubelet/pods/pod.json").write_bytes(pod)
    # A kubelet reads there whether the kernel ended something for want of memory.
    installed.ok("ln", "-sf", "null", "/dev/kmsg")
    installed.ok("nixlet", "image", "load", "/ordinary.tar")
    kubelet = ["/src/kubelet/kubelet", "--config", "/src/kubelet/config", "--root-dir", "/var/lib/k3s", "--hostname-override", "k3s"]  # fmt: skip
    with kubernetes.apart():
        # The machine's are this one's, and not to be written there.
        for name, value in (("vm/overcommit_memory", "1"), ("kernel/panic", "10"), ("kernel/panic_on_oops", "1")):
            Path("/proc/sys", name).write_text(value)
        try:
            installed.ok("systemd-run", "--quiet", "--unit=kubelet", "--property=Delegate=yes", *kubelet)
            listed = ("nixlet", "ps")
            until(lambda: re.search(r" running .* k3s", installed.ok(*listed)), "the pod runs")
            assert any(place.startswith("/kubepods.slice/") for place in cgroups_of(installed, sleeper(installed)))
        finally:
            installed.run("systemctl", "stop", "kubelet")
            installed.ok("nixlet-killall.sh")
            installed.run("systemctl", "stop", "kubepods.slice")
            # A kubelet mounts its directory on itself.
            installed.run("umount", "/var/lib/k3s")
            installed.ok("rm", "-rf", "/src/kubelet", "/var/lib/k3s")


def test_an_agent_joins_a_cluster(machine: machines.Machine, tmp_path: Path) -> None:
    """As k3s's script makes one: by nothing but two variables; with the programs of Kubernetes that it finds."""
    containerd = parts.containerd(parts.CONTAINERDS[-1])
    shutil.copytree(containerd.parent, machine.root / "src/containerd")
    (machine.root / "src/kubernetes").mkdir()
    for program in ("kubelet", "kube-proxy"):
        shutil.copy(parts.kubernetes() / program, machine.root / "src/kubernetes")
    machine.ok("sh", "-c", "if [ -e /usr/local/bin/nixlet-uninstall.sh ]; then nixlet-uninstall.sh; fi")
    # A kubelet reads there whether the kernel ended something for want of memory.
    machine.ok("ln", "-sf", "null", "/dev/kmsg")
    cluster = kubernetes.Cluster(66, tmp_path, "--containerd", str(containerd))
    address = f"{cluster.address.rpartition('.')[0]}.9"
    with kubernetes.cleaned_up(cluster), machine.linked(cluster.interface, f"{address}/24", cluster.address):
        cluster.start()
        cluster.await_node()
        token = (cluster.data_dir / "server/node-token").read_text().strip()
        flags = ("--kubernetes-bin-dir", "/src/kubernetes", "--containerd", "/src/containerd/containerd")
        given = {"NIXLET_URL": f"https://{cluster.address}:6443", "NIXLET_TOKEN": token}
        done = install(machine, "1.0.0", *flags, **given)
        assert done.returncode == 0, done.stderr
        assert machine.show("nixlet-agent", "ActiveState") == "active"
        assert token not in machine.ok("systemctl", "show", "nixlet-agent")
        assert token not in machine.ok("cat", "/etc/systemd/system/nixlet-agent.service")
        node = f"node/{machine.ok('hostname').strip()}"
        ready = ["wait", "--for=condition=Ready", "--timeout=120s", node]
        kubernetes.until(lambda: node in cluster.kubectl("get", "nodes", "--output=name"), "it has joined")
        cluster.kubectl(*ready)
        # The kubelet has systemd make what its pods will be in, as containerd has.
        assert machine.show("kubepods-burstable.slice", "ActiveState") == "active"
        # An upgrade without a word more keeps what it is.
        done = install(machine, "1.1.0", PIP_FIND_LINKS="")
        assert done.returncode == 0, done.stderr
        assert runs(machine) == "1.1.0"
        cluster.kubectl(*ready)
        done = machine.run("nixlet-agent-uninstall.sh")
        assert done.returncode == 0, done.stderr
        assert traces(machine) == [], done.stdout
        assert machine.ok("systemctl", "list-units", "--all", "--no-legend", "kubepods*") == ""
        assert machine.ok("sh", "-c", "find /sys/fs/cgroup -name 'kubepods*'") == ""
