"""Command lines that are measured side by side: nixlet's and nerdctl's, on one node's containerd."""

import argparse
import contextlib
import dataclasses
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import measure
from nixlet.host import mounts
from support import nodes, parts

#: The containerds that nerdctl works with.
CONTAINERDS = parts.CONTAINERDS[1:]

#: containerd's namespace and the image's name for nerdctl. Another namespace than CRI's: neither tool sees the other's containers.
NAMESPACE = "bench"
IMAGE = "localhost/bench:1"

#: The bridge that nerdctl makes.
_BRIDGE = "nerdctl0"

#: Seconds that any command may take.
PATIENCE = 600.0


def arguments(description: str, quick: str) -> argparse.ArgumentParser:
    """The arguments of a benchmark beside nerdctl.

    Args:
        description: What it measures.
        quick: What its short form is.
    """
    parser = measure.arguments(description)
    parser.add_argument("--containerd", choices=CONTAINERDS, action="append", help="only these versions")
    parser.add_argument("--quick", action="store_true", help=f"{quick}: to see that it works")
    return parser


def versions(chosen: argparse.Namespace) -> Sequence[str]:
    """The containerds that are measured: those that were named, or all, or the newest for a short form."""
    named: Sequence[str] | None = chosen.containerd
    return named or (CONTAINERDS[-1:] if chosen.quick else CONTAINERDS)


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended.

    Attributes:
        ms: From before its start until its end, in milliseconds.
        cpu_ms: What it and its children used of the processors, user and system, in milliseconds (wait4(2)).
        output: What it printed.
    """

    ms: float
    cpu_ms: float
    output: str


class Tool:
    """A command line that runs containers.

    Attributes:
        name: What tables call it.
        image: What it calls the image.
        whole_log: Options of its "run" by which all that the container prints stays in its log.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        environment: Mapping[str, str],
        image: str,
        whole_log: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.image = image
        self.whole_log = tuple(whole_log)
        self._argv = list(argv)
        self._environment = dict(environment)

    def started(self, *arguments: str, stdout: IO[bytes] | int, stderr: IO[bytes] | int) -> "subprocess.Popen[bytes]":
        """Start it."""
        return subprocess.Popen(
            [*self._argv, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
        )

    def ran(self, *arguments: str) -> Ran:
        """Run it to its end, which must be a success."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            start = time.perf_counter()
            process = self.started(*arguments, stdout=out, stderr=err)
            _, status, usage = os.wait4(process.pid, 0)
            taken = (time.perf_counter() - start) * 1000
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            err.seek(0)
            said = err.read().decode(errors="replace")
            assert process.returncode == 0, f"{self.name} {' '.join(arguments)}: {process.returncode}: {said}"
            return Ran(taken, (usage.ru_utime + usage.ru_stime) * 1000, out.read().decode())

    def piped(self, *arguments: str) -> tuple[float, int]:
        """Run it with a reader at its output; the milliseconds that it takes, and how many bytes came."""
        with tempfile.TemporaryFile() as err:
            start = time.perf_counter()
            process = self.started(*arguments, stdout=subprocess.PIPE, stderr=err)
            assert process.stdout is not None
            with process.stdout as output:
                counted = subprocess.run(["wc", "-c"], stdin=output, capture_output=True, check=True)
            code = process.wait(PATIENCE)
            taken = (time.perf_counter() - start) * 1000
            err.seek(0)
            assert code == 0, f"{self.name} {' '.join(arguments)}: {code}: {err.read().decode(errors='replace')}"
        return taken, int(counted.stdout)


def nixlet(node: nodes.Node, image: str) -> Tool:
    """The command that people type."""
    return Tool("nixlet", [".venv/bin/nixlet"], node.environment, image)


@contextlib.contextmanager
def nerdctl(node: nodes.Node, directory: Path) -> Iterator[Tool]:
    """nerdctl on the node's containerd and snapshotter, with a network of its own making.

    With a Nix image each of its runs leaves a directory with mounts of the image's root below TMPDIR, so it has a TMPDIR of its own. Its
    bridge goes as well: the next one would find its addresses taken.
    """
    own = directory / "nerdctl"
    for name in ("tmp", "net.d", "data"):
        (own / name).mkdir(parents=True)
    argv = [str(parts.directories()["nerdctl"] / "nerdctl"), "--address", str(node.containerd_socket)]
    argv += ["--namespace", NAMESPACE, "--snapshotter", "nix", "--data-root", str(own / "data")]
    argv += ["--cni-path", "/usr/lib/cni", "--cni-netconfpath", str(own / "net.d")]
    # Its hooks are started by runc with nerdctl's own environment.
    environment = {**os.environ, "TMPDIR": str(own / "tmp"), "NERDCTL_TOML": "/dev/null"}
    try:
        yield Tool("nerdctl", argv, environment, IMAGE, ("--log-opt", "max-size=16g"))
    finally:
        if _BRIDGE in (name for _, name in socket.if_nameindex()):
            subprocess.run(["ip", "link", "delete", _BRIDGE], check=True)
        for entry in reversed(mounts.below(str(own))):
            mounts.unmount(entry.path)
