"""A real systemd to start units with, whatever runs as the first process: a user's manager, with everything at a place of its own."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

#: It asks for systemd as the first process by this directory, and needs nothing else of it. In a mount namespace of its own.
_START = """
mount -t tmpfs -o mode=755 none /run/systemd
mkdir /run/systemd/system
exec /lib/systemd/systemd --user --unit=tests.target
"""


class Manager:
    """A manager of units.

    Attributes:
        environment: For systemctl.
        units: The directory of its units.
    """

    def __init__(self, directory: Path, runtime: Path) -> None:
        self.units = directory / "systemd/user"
        self._log = directory / "systemd.log"
        own = {"XDG_CONFIG_HOME": str(directory), "XDG_RUNTIME_DIR": str(runtime), "HOME": str(directory)}
        self.environment = {**os.environ, **own}

    def systemctl(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        argv = ["systemctl", "--user", "--no-pager", *arguments]
        return subprocess.run(argv, env=self.environment, capture_output=True, text=True, timeout=100, check=False)

    def ok(self, *arguments: str) -> str:
        done = self.systemctl(*arguments)
        assert done.returncode == 0, f"{done.stderr}{self._log.read_text()}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        return self.ok("show", "--property", name, "--value", unit).strip()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The manager, for the time of the context; its units end with it."""
        self.units.mkdir(parents=True)
        (self.units / "tests.target").write_text("[Unit]\nDefaultDependencies=no\n")
        Path("/run/systemd").mkdir(exist_ok=True)
        argv = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _START]
        with (
            self._log.open("wb") as log,
            subprocess.Popen(argv, env=self.environment, stdout=log, stderr=log) as process,
        ):
            try:
                for _ in range(300):
                    if self.systemctl("is-active", "tests.target").returncode == 0:
                        break
                    assert process.poll() is None, self._log.read_text()
                    time.sleep(0.05)
                yield
            finally:
                process.terminate()
                process.wait(60)

    def install(self, source: Path, program: Path, arguments: str, environment: dict[str, str]) -> str:
        """Have a unit of deploy/ as it stands, but for the program's place and more arguments and variables; its name."""
        text = source.read_text()
        text, count = re.subn(
            r"^ExecStart=/usr/local/bin/nixlet (\w+)$", rf"ExecStart={program} \1 {arguments}", text, flags=re.MULTILINE
        )
        assert count == 1
        lines = "".join(f'Environment="{name}={value}"\n' for name, value in environment.items())
        (self.units / source.name).write_text(text.replace("[Service]\n", f"[Service]\n{lines}"))
        self.ok("daemon-reload")
        return source.name
