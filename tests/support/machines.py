"""A machine to install things on: a Debian of its own below a directory, with systemd as its first process, and no way out.

It has namespaces and cgroups of its own, and a network that leads nowhere. What it may fetch lies in it: Debian's packages in ``/debs``,
where its apt looks, and Python's in ``/wheels``.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from support import parts

ROOT = Path(__file__).parents[2]

#: What of a checkout is installed from.
SOURCE = (
    *("install.sh", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "docs"),
    *("deploy", "nix", "requirements/runtime.txt", "scripts", "src"),
)

#: From the outside, into cgroups of its own; then the rest in namespaces.
_JOIN = r"""
group=$1
shift
grep -E '^[^ ]+ /sys/fs/cgroup[^ ]* cgroup2? ' /proc/self/mounts | sort -u -k 2,2 | while read -r _ place _; do
  mkdir "$place/$group"
  for file in cpuset.cpus cpuset.mems; do
    if [ -e "$place/$file" ] && [ ! -e "$place/cgroup.controllers" ]; then cat "$place/$file" >"$place/$group/$file"; fi
  done
  echo $$ >"$place/$group/cgroup.procs"
done
exec unshare --mount --propagation private --pid --fork --kill-child --uts --ipc --net --cgroup sh -euc "$0" boot "$@"
"""

#: As the first process: file systems of its own, then its init.
_BOOT = r"""
root=$1
shift
mount --bind "$root" "$root"
cgroups=$(grep -E '^[^ ]+ /sys/fs/cgroup[^ ]* cgroup2? ' /proc/self/mounts | sort -u -k 2,2)
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount --bind "$root/proc/sys/net" "$root/proc/sys/net"
# Most of what is set there is the whole machine's.
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs sysfs "$root/sys"
case $cgroups in
  *' /sys/fs/cgroup cgroup2 '*) ;;
  *) mount -t tmpfs -o mode=755 tmpfs "$root/sys/fs/cgroup" ;;
esac
echo "$cgroups" | while read -r _ place kind options _; do
  options=$(echo "$options" | sed -E 's/^(rw|ro),?//; s/(relatime|nosuid|nodev|noexec|nsdelegate|memory_recursiveprot),?//g; s/,$//; s/.*name=/none,name=/')
  mkdir -p "$root$place"
  mount -t "$kind" ${options:+-o "$options"} cgroup "$root$place"
done
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero full random urandom tty; do
  : >"$root/dev/$name"
  mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
hostname machine
mkdir "$root/.old"
cd "$root"
pivot_root . .old
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -euc 'umount -l /.old; rmdir /.old; cd /; exec "$@"' boot "$@"
"""


class Machine:
    """A machine that is up.

    Attributes:
        root: Its root directory, as seen from here.
    """

    def __init__(self, root: Path, pid: int, variables: Mapping[str, str]) -> None:
        self.root = root
        self._pid = pid
        self._variables = dict(variables)

    def popen(
        self, *arguments: str, umask: str = "022", variables: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Start a program in it, whose standard input, output and errors are pipes."""
        named = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", **self._variables, **(variables or {})}  # fmt: skip
        argv = [
            "nsenter",
            "--target",
            str(self._pid),
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--net",
            "--cgroup",
            "--wd=/",
        ]
        argv += ["env", "--chdir=/", "-i", *(f"{name}={value}" for name, value in named.items())]
        argv += ["sh", "-c", f'umask {umask}; exec "$@"', "sh", *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def run(
        self, *arguments: str, stdin: str = "", umask: str = "022", variables: Mapping[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program in it."""
        with self.popen(*arguments, umask=umask, variables=variables) as process:
            try:
                output, errors = process.communicate(stdin, timeout=400)
            finally:
                process.kill()
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    def ok(self, *arguments: str, **more: object) -> str:
        """Run a program in it that must do well; what it printed."""
        done = self.run(*arguments, **more)  # type: ignore[arg-type]  # as run takes them
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def linked(self, bridge: str, address: str, gateway: str) -> Iterator[None]:
        """A way out of it for the time of the context: a bridge of this machine's.

        Args:
            bridge: Its name.
            address: The machine's address there, with the length of its prefix.
            gateway: Where its default route leads.
        """
        inside = ["nsenter", "--target", str(self._pid), "--net", "ip"]
        link = f"nixmach{self._pid % 10000}"
        commands = (
            ["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(self._pid)],
            ["ip", "link", "set", link, "master", bridge, "up"],
            [*inside, "link", "set", "lo", "up"],
            [*inside, "address", "add", address, "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "route", "add", "default", "via", gateway],
        )
        try:
            for command in commands:
                subprocess.run(command, check=True)
            yield
        finally:
            subprocess.run(["ip", "link", "delete", link], check=True)

    def show(self, unit: str, name: str) -> str:
        """What its systemd says of a unit."""
        return self.ok("systemctl", "show", "--property", name, "--value", unit).strip()


@contextlib.contextmanager
def booted(directory: Path) -> Iterator[Machine]:
    """A bare machine, up, for the time of the context; the directory is for its files, and lies on a disk."""
    part = parts.directories()["debian"]
    root = directory / "root"
    # Nobody but root goes in: it has programs that make their caller root.
    directory.chmod(0o700)
    subprocess.run(["cp", "--archive", "--reflink=auto", str(part / "root"), str(root)], check=True)
    for given in ("debs", "wheels"):
        shutil.copytree(part / given, root / given, dirs_exist_ok=True)
    group = f"nixlet-test-{uuid.uuid4().hex[:12]}"
    argv = ["sh", "-euc", _JOIN, _BOOT, group, str(root), "/lib/systemd/systemd", "--system", "--log-target=console"]
    with (directory / "console").open("wb") as console:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    try:
        pid = _first_process(process, directory / "console")
        # As if an index were there that has them.
        machine = Machine(root, pid, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"})
        for _ in range(600):
            if machine.run("systemctl", "is-active", "multi-user.target").returncode == 0:
                break
            time.sleep(0.05)
        else:
            raise AssertionError((directory / "console").read_text(errors="replace"))
        machine.ok("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        yield machine
    finally:
        # Its namespaces' first process takes all others along.
        process.kill()
        process.wait(60)
        _remove_cgroups(group)
        shutil.rmtree(root)


def _first_process(process: "subprocess.Popen[bytes]", console: Path) -> int:
    """The machine's first process, once it is systemd."""
    for _ in range(600):
        assert process.poll() is None, console.read_text(errors="replace")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n":
            return int(children[0])
        time.sleep(0.05)
    raise AssertionError(console.read_text(errors="replace"))


def _remove_cgroups(group: str) -> None:
    tops = [Path(line.split()[1]) / group for line in Path("/proc/self/mounts").read_text().splitlines() if " cgroup" in line]  # fmt: skip
    deadline = time.monotonic() + 30
    for top in tops:
        while top.is_dir():
            for directory, _, _ in os.walk(top, topdown=False):
                for pid in Path(directory, "cgroup.procs").read_text().split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
            assert time.monotonic() < deadline, top
            time.sleep(0.02)


def source(place: Path, version: str, *, edits: Mapping[str, tuple[str, str]] | None = None) -> None:
    """Put a source of nixlet somewhere that says to be of a version.

    Args:
        place: The directory to make.
        version: What it says.
        edits: Further changes, by file: what stands there, once, and what is to.
    """
    for name in SOURCE:
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(ROOT / name, target)
    init = place / "src/nixlet/__init__.py"
    head = '__version__ = "'
    before = init.read_text()
    said = before[before.index(head) :].split('"')[1]
    for name, (old, new) in {
        "src/nixlet/__init__.py": (f'{head}{said}"', f'{head}{version}"'),
        **(edits or {}),
    }.items():
        text = (place / name).read_text()
        assert text.count(old) == 1, (name, old)
        (place / name).write_text(text.replace(old, new))
