"""Real Nix stores for tests: private ones, made below a directory, that don't touch /nix."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from nixlet.store.daemon import client


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
