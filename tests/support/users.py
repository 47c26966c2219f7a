"""An ordinary user, made for a test, with nodes of their own.

The user is known in a mount namespace alone, with files of its own for passwd(5), group(5), subuid(5) and subgid(5), and a /dev/net/tun that is
for everybody: nothing of that is the machine's, whatever happens to the test.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nixlet.host import mounts, unixsocket
from support import nodes, parts

_CGROUPS = Path("/sys/fs/cgroup")

#: Of how many further users a user is the root.
_IDS = 65_536

#: Becomes a command in the cgroups that its first words name.
_JOINING = 'while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done; shift; exec "$@"'


class User:
    """An ordinary user.

    Attributes:
        uid: Their number, and that of their group.
        home: Their directory.
        runtime: Their $XDG_RUNTIME_DIR.
        images: A directory for image archives, which are theirs.
        cgroups: Those that were delegated to them.
        environment: What a session of theirs has.
    """

    def __init__(self, number: int) -> None:
        self.name = f"nixlet-test-{number}"
        # Others run these tests beside us, with the same places, and whoever sees their processes must not take them for ours.
        chance = secrets.randbelow(10_000)
        self.uid, self.first_id = 20_000 + chance, 10_000_000 + chance * _IDS
        self.base = Path(tempfile.mkdtemp(prefix=f"nixlet-user-{number}-", dir="/tmp"))
        self.base.chmod(0o755)
        self.home, self.images = self.base / "home", self.base / "images"
        self.runtime = Path(f"/run/nixlet-test/{number}")
        self.cgroups: list[Path] = []
        self.environment = {
            "HOME": str(self.home),
            "USER": self.name,
            "PATH": os.environ["PATH"],
            "XDG_RUNTIME_DIR": str(self.runtime),
            "NIX_REMOTE": f"unix://{self.base}/nix.sock",
            "NIX_CONFIG": "substituters =",
        }
        self._holder: subprocess.Popen[bytes] | None = None

    def own(self, path: Path, mode: int = 0o700) -> None:
        """Make a directory of theirs."""
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, self.uid, self.uid)
        path.chmod(mode)

    def give(self, source: Path) -> Path:
        """A copy of an image archive, for their node."""
        target = self.images / source.name
        shutil.copyfile(source, target)
        os.chown(target, self.uid, self.uid)
        return target

    def command(self, argv: Sequence[str], *, joins: Sequence[Path] = ()) -> list[str]:
        """The command line by which root has them run something; the process is that of the command."""
        assert self._holder is not None
        to = ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt"]
        joining = ["sh", "-c", _JOINING, "sh", *map(str, joins), "--"]
        become = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]
        return [*to, *joining, *become, *argv]

    def run(self, *argv: str, stdin: bytes | None = None) -> "subprocess.CompletedProcess[str]":
        """Run something as them."""
        return subprocess.run(
            self.command(argv), env=self.environment, input=None if stdin is None else stdin.decode(),
            capture_output=True, text=True, timeout=170, check=False, cwd="/",
        )  # fmt: skip

    @contextlib.contextmanager
    def systemd(self) -> Iterator[None]:
        """A manager of their own for their services, as a session has one, for the time of the context."""
        self.as_root(
            "sh",
            "-ec",
            "mkdir -p /run/systemd; mount -t tmpfs -o mode=755 none /run/systemd; mkdir /run/systemd/system",
        )
        argv = self.command(["/lib/systemd/systemd", "--user", "--unit=default.target"], joins=self.cgroups)
        with (
            (self.base / "systemd.log").open("wb") as log,
            subprocess.Popen(argv, env=self.environment, stdout=log, stderr=log, cwd="/") as manager,
        ):
            try:
                for _ in range(600):
                    if self.run("systemctl", "--user", "is-active", "default.target").returncode == 0:
                        break
                    assert manager.poll() is None, (self.base / "systemd.log").read_text()
                    time.sleep(0.05)
                yield
            finally:
                manager.terminate()
                manager.wait(60)
                self.as_root("umount", "/run/systemd")

    def as_root(self, *argv: str) -> None:
        """Have root do something where they are known."""
        assert self._holder is not None
        subprocess.run(["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", *argv], check=True)

    def nixlet(self, *arguments: str, stdin: bytes | None = None) -> "subprocess.CompletedProcess[str]":
        """Run a verb as them."""
        return self.run(sys.executable, "-m", "nixlet", *arguments, stdin=stdin)

    def ok(self, *arguments: str, stdin: bytes | None = None) -> str:
        """Run a verb that must work; what it printed."""
        done = self.nixlet(*arguments, stdin=stdin)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def processes(self) -> dict[int, str]:
        """The processes that are theirs, or of one of the users whose root they are, by number, with their names."""
        ours = {self.uid, *range(self.first_id, self.first_id + _IDS)}
        found = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    fields = dict(line.split(":", 1) for line in Path(f"/proc/{entry}/status").read_text().splitlines())
                    if int(fields["Uid"].split()[1]) in ours and not fields["State"].strip().startswith("Z"):
                        found[int(entry)] = fields["Name"].strip()
        return found

    def _prepare(self) -> None:
        for path in (self.home, self.runtime):
            self.own(path)
        self.own(self.images, 0o755)
        etc = self.base / "etc"
        etc.mkdir()
        lines = {
            "passwd": f"{self.name}:x:{self.uid}:{self.uid}::{self.home}:/bin/sh\n",
            "group": f"{self.name}:x:{self.uid}:\n",
            "subuid": f"{self.name}:{self.first_id}:{_IDS}\n",
            "subgid": f"{self.name}:{self.first_id}:{_IDS}\n",
        }
        for name, line in lines.items():
            (etc / name).write_text(Path("/etc", name).read_text() + line)

    def _script(self) -> str:
        lines = ["set -e"]
        lines += [
            f"mount --bind {self.base}/etc/{name} /etc/{name}" for name in ("passwd", "group", "subuid", "subgid")
        ]
        lines += [f"mkdir {self.base}/dev", f"mount -t tmpfs -o mode=755 tmpfs {self.base}/dev"]
        lines += [f"mknod -m 666 {self.base}/dev/tun c 10 200", f"mount --bind {self.base}/dev/tun /dev/net/tun"]
        # Python, and the cache of parts, may lie where an ordinary user doesn't get, as in root's own directory.
        needed = [
            Path(sys.base_prefix),
            *(
                each
                for family, each in parts.directories().items()
                if family == "tools" or family.startswith("containerd-")
            ),
        ]
        hidden = {above: [each for each in needed if above in each.parents] for above in map(_closed, needed) if above}
        for above, below in hidden.items():
            for number, each in enumerate(below):
                lines += [f"mkdir {self.base}/{number}", f"mount --bind {each} {self.base}/{number}"]
            lines += [f"mount -t tmpfs -o mode=755 tmpfs {above}"]
            for number, each in enumerate(below):
                lines += [
                    f"mkdir -p {each}",
                    f"mount --move {self.base}/{number} {each}",
                    f"rmdir {self.base}/{number}",
                ]
        return "\n".join([*lines, "echo ready", "exec sleep infinity"])

    def hierarchies(self) -> list[str]:
        """The directories of cgroups that the machine has: those of version 1, or version 2 alone."""
        if (_CGROUPS / "cgroup.controllers").exists():
            return [""]
        unified = ["unified"] if (_CGROUPS / "unified").is_dir() else []
        fields = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
        return [names.removeprefix("name=") for number, names, _ in fields if number != "0"] + unified

    @contextlib.contextmanager
    def delegation(self) -> Iterator[list[Path]]:
        """Cgroups that root gives them, for the time of the context."""
        made = []
        try:
            for hierarchy in self.hierarchies():
                cgroup = _CGROUPS / hierarchy / self.base.name
                cgroup.mkdir()
                made.append(cgroup)
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if (cgroup / name).exists() and hierarchy:
                        (cgroup / name).write_text((cgroup.parent / name).read_text())
                for path in (cgroup, *cgroup.iterdir()):
                    os.chown(path, self.uid, self.uid)
            yield made
        finally:
            for cgroup in made:
                for below, _, _ in os.walk(cgroup, topdown=False):
                    _remove_cgroup(Path(below))

    @contextlib.contextmanager
    def nix_daemon(self) -> Iterator[None]:
        """A daemon for the machine's store that ordinary users may ask."""
        socket = self.base / "nix.sock"
        own = {
            "NIX_DAEMON_SOCKET_PATH": str(socket),
            "NIX_CONFIG": "build-users-group =\nsandbox = false\nsubstituters =",
        }
        with (
            (self.base / "nix.log").open("wb") as log,
            subprocess.Popen(["nix-daemon"], env={**os.environ, **own}, stdout=log, stderr=log) as daemon,
        ):
            try:
                nodes.until(lambda: unixsocket.is_served(str(socket)), "the Nix daemon serves")
                yield
            finally:
                daemon.terminate()

    @classmethod
    @contextlib.contextmanager
    def made(cls, number: int) -> Iterator["User"]:
        """One for the time of the context, with all that is theirs."""
        user = cls(number)
        try:
            user._prepare()
            argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", user._script()]
            with subprocess.Popen(argv, stdout=subprocess.PIPE) as holder, contextlib.ExitStack() as stack:
                user._holder = holder
                try:
                    assert holder.stdout is not None
                    assert holder.stdout.readline() == b"ready\n"
                    stack.enter_context(user.nix_daemon())
                    user.cgroups = stack.enter_context(user.delegation())
                    yield user
                finally:
                    user.end_processes()
                    holder.kill()
        finally:
            shutil.rmtree(user.runtime, ignore_errors=True)
            assert not mounts.below(str(user.base))
            shutil.rmtree(user.base, ignore_errors=True)

    def end_processes(self) -> None:
        """Kill what is left of theirs."""
        for _ in range(100):
            left = self.processes()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if not left:
                return
            time.sleep(0.05)


def _closed(path: Path) -> Path | None:
    """The topmost directory on the way to a path that others than its owner don't get through."""
    return next((each for each in reversed(path.parents) if not each.stat().st_mode & 0o001), None)


def _remove_cgroup(path: Path) -> None:
    for _ in range(100):
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            # The kernel takes its time with what has just ended there.
            time.sleep(0.05)
        else:
            return


class Node:
    """A node of an ordinary user.

    Attributes:
        user: Whose.
        log: What it printed.
    """

    def __init__(self, user: User, *arguments: str, containerd: str = "") -> None:
        self.user = user
        self.arguments = ["--archive-dir", str(user.images), *arguments]
        if containerd:
            self.arguments += ["--containerd", str(parts.containerd(containerd))]
        self.log = user.base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def state_dir(self) -> Path:
        return self.user.runtime / "nixlet"

    @property
    def data_dir(self) -> Path:
        return self.user.home / ".local/share/nixlet"

    def launch(self, *, delegated: bool = True) -> "subprocess.Popen[bytes]":
        """Start it without waiting for it."""
        argv = [sys.executable, "-m", "nixlet", "server", "--rootless", *self.arguments]
        command = self.user.command(argv, joins=self.user.cgroups if delegated else ())
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=self.user.environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd="/",
                umask=0o077,
            )
        return self.process

    def start(self, *, delegated: bool = True) -> None:
        """Start it and wait until it is ready."""
        process = self.launch(delegated=delegated)
        deadline = time.monotonic() + nodes.START_SECONDS
        while '"node": null' in self.user.ok("version", "--output", "json"):
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def stop(self) -> int:
        """End it in order; its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def pid_of(self, name: str) -> int:
        """The one process of the user's that is called so; 0: there is none at the moment."""
        found = [pid for pid, called in self.user.processes().items() if called == name[:15]]
        return found[0] if len(found) == 1 else 0

    def child_of(self, parent: int, name: str) -> int:
        """The one child of a process that is called so, or begins like it."""
        there = self.user.processes().items()
        (pid,) = [pid for pid, called in there if called.startswith(name) and _parent(pid) == parent]
        return pid


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
