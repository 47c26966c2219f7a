"""Real Nix stores for tests: private ones, made below a directory, that don't touch /nix."""

import contextlib
import hashlib
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from nixlet.store import paths
from nixlet.store.daemon import client


def _text(data: str | bytes) -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return struct.pack("<Q", len(raw)) + raw + bytes(-len(raw) % 8)


def nar_file(content: bytes, *, executable: bool = False) -> bytes:
    """The archive of a plain file (Nix manual, "Nix Archive (NAR) format"), without the magic."""
    mark = [_text("executable"), _text("")] if executable else []
    return b"".join([_text("("), _text("type"), _text("regular"), *mark, _text("contents"), _text(content), _text(")")])


def nar_link(target: str) -> bytes:
    return b"".join([_text("("), _text("type"), _text("symlink"), _text("target"), _text(target), _text(")")])


def nar_directory(entries: Mapping[str, bytes]) -> bytes:
    parts = [_text("("), _text("type"), _text("directory")]
    for name, node in sorted(entries.items()):
        parts += [_text("entry"), _text("("), _text("name"), _text(name), _text("node"), node, _text(")")]
    return b"".join([*parts, _text(")")])


def delete(*doomed: str) -> None:
    """Delete paths of the host's store; a node's connection to Nix may hold them for some seconds yet."""
    deadline = time.monotonic() + 30
    while True:
        done = subprocess.run(["nix-store", "--delete", *doomed], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.1)


class Import:
    """Store paths that are added all at once, with references, without being built (``nix-store --import``)."""

    def __init__(self, store_dir: str = paths.DEFAULT_STORE_DIR) -> None:
        self._store_dir = store_dir
        self._export: list[bytes] = []

    def add(self, name: str, node: bytes, references: Sequence[str] = ()) -> paths.StorePath:
        """Add an archive's node; its path, which depends on all of it."""
        digest = hashlib.sha256(b"\0".join([name.encode(), node, *(each.encode() for each in references)])).hexdigest()
        path = paths.from_name(f"{digest[:32].replace('e', 'z')}-{name}", self._store_dir)
        listed = [struct.pack("<Q", len(references)), *map(_text, references)]
        self._export += [struct.pack("<Q", 1), _text("nix-archive-1"), node, struct.pack("<Q", 0x4558494E)]
        self._export += [_text(path), *listed, _text(""), struct.pack("<Q", 0)]
        return path

    def run(self, environment: Mapping[str, str]) -> None:
        export = b"".join([*self._export, struct.pack("<Q", 0)])
        argv = ["nix-store", "--import"]
        done = subprocess.run(argv, env=dict(environment), input=export, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()


class PrivateStore:
    """A store of its own, with the environment that makes Nix's programs use it."""

    def __init__(self, directory: Path, **config: str) -> None:
        self.directory = directory
        self.store_dir = str(directory / "store")
        self.state_dir = str(directory / "state")
        # A daemon whose state isn't there yet takes itself for a client, and asks itself for ever.
        (directory / "state").mkdir(parents=True)
        conf = directory / "conf"
        conf.mkdir(parents=True)
        # No caches but those of the test itself: tests talk to this machine only.
        settings = {"build-users-group": "", "sandbox": "false", "substituters": ""}
        settings |= {"experimental-features": "nix-command", **config}
        (conf / "nix.conf").write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "NIX_STORE_DIR": self.store_dir,
            "NIX_STATE_DIR": self.state_dir,
            "NIX_LOG_DIR": str(directory / "log"),
            "NIX_CONF_DIR": str(conf),
        }

    def nix(self, *argv: str) -> str:
        """Run one of Nix's programs; what it printed."""
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout.strip()

    def add(self, name: str, content: str | Mapping[str, str]) -> str:
        """Add a file, or a directory of files; the store path."""
        source = self.directory / "sources" / name
        if isinstance(content, str):
            source.parent.mkdir(exist_ok=True)
            source.write_text(content)
        else:
            source.mkdir(parents=True)
            for file, text in content.items():
                (source / file).write_text(text)
        return self.nix("nix-store", "--add", str(source))

    def texts(self, texts: Mapping[str, str], references: Sequence[str] = ()) -> list[paths.StorePath]:
        """Add plain files, by name; the store paths."""
        adding = Import(self.store_dir)
        added = [adding.add(name, nar_file(text.encode()), references) for name, text in texts.items()]
        adding.run(self.environment)
        return added

    def text(self, name: str, text: str, references: Sequence[str] = ()) -> paths.StorePath:
        """Add a plain file with references; the store path."""
        return self.texts({name: text}, references)[0]

    @property
    def settings(self) -> client.DaemonSettings:
        """How to reach it without a daemon's socket."""
        return client.DaemonSettings.from_environment(self.environment)

    @contextlib.contextmanager
    def daemon(self) -> Iterator[client.DaemonSettings]:
        """A real nix-daemon on a socket of its own."""
        socket = self.directory / "d" / "socket"
        environment = {**self.environment, "NIX_DAEMON_SOCKET_PATH": str(socket)}
        with subprocess.Popen(["nix-daemon"], env=environment, stderr=subprocess.DEVNULL) as daemon:
            try:
                for _ in range(500):
                    if socket.exists():
                        break
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        daemon.wait(0.02)
                yield client.DaemonSettings.from_environment(environment)
            finally:
                daemon.terminate()

    def remove(self) -> None:
        """Delete the store, whose content is read-only."""
        subprocess.run(["chmod", "-R", "u+w", str(self.directory)], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)
