"""Real Nix daemons for tests, started so that they can be counted."""

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path


class Started:
    """How many ``nix-daemon --stdio`` were started.

    Attributes:
        environment: With it, programs start those that are counted.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str]) -> None:
        """Make a program in ``directory`` that stands for nix-daemon in ``environment``."""
        self._log = directory / "started"
        self._log.touch()
        self.environment = {**environment, "PATH": f"{directory}:{environment['PATH']}"}
        real = shutil.which("nix-daemon", path=environment["PATH"])
        program = directory / "nix-daemon"
        program.write_text(f'#!/bin/sh\necho $$ >>{self._log}\nexec {real} "$@"\n')
        program.chmod(0o755)

    @property
    def pids(self) -> list[int]:
        """All of them, in their order, also those that have ended."""
        return [int(line) for line in self._log.read_text().splitlines()]

    @property
    def running(self) -> list[int]:
        """Those that haven't ended."""
        return [pid for pid in self.pids if os.path.exists(f"/proc/{pid}/exe") and os.path.realpath(f"/proc/{pid}/exe")]


class Listening:
    """A socket with a daemon behind each of its connections, which are counted.

    Attributes:
        socket: Where it is.
        connections: How many there were.
    """

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self.socket = path
        self.connections = 0
        self._environment = dict(environment)
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listening.accept()
                with accepted:
                    self.connections += 1
                    argv = ["nix-daemon", "--stdio"]
                    fd = accepted.fileno()
                    daemon = subprocess.Popen(
                        argv, stdin=fd, stdout=fd, stderr=subprocess.DEVNULL, env=self._environment
                    )
                    self._daemons.append(daemon)

    @classmethod
    @contextlib.contextmanager
    def at(cls, path: Path, environment: Mapping[str, str]) -> Iterator["Listening"]:
        """One that serves for the time of the context."""
        made = cls(path, environment)
        made._thread.start()
        try:
            yield made
        finally:
            # Wakes whoever waits for a connection; closing doesn't.
            made._listening.shutdown(socket.SHUT_RDWR)
            made._thread.join()
            made._listening.close()
            for daemon in made._daemons:
                daemon.terminate()
                daemon.wait()
