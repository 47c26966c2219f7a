"""Snapshotters that stand alone (`nixlet snapshotter`), and containerds that aren't nixlet's, to be stopped and killed."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

from nixlet.host import mounts, unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import containerd_snapshots_grpc
from nixlet.rpc.gen import containerd_snapshots_pb2 as pb
from nixlet.store import roots as gcroots
from support import nodes, parts, storeimages

REF = "containerd.io/snapshot.ref"
LAYER = "containerd.io/snapshot/nix-layer"
PATH = "containerd.io/snapshot/nix-store-path."
CLOSURE = "containerd.io/snapshot/nix-closure"

#: The first descriptor that a service manager hands over.
_HANDED = 3


class Alone:
    """A place for a snapshotter of its own.

    Attributes:
        root: Its directory.
        run: A directory for sockets and running state, short as socket paths must be.
        socket: Where it serves.
        containerd_socket: Where its containerd serves.
        log: What they printed.
    """

    def __init__(self, number: int, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        self.log = directory / "log"
        self.run = Path(f"/run/nixlet-test/{number}")
        self.socket = self.run / "s" / "nix.sock"
        self.containerd_socket = self.run / "containerd.sock"

    @property
    def gc_roots(self) -> Path:
        """Where Nix finds what it needs."""
        return Path("/nix/var/nix/gcroots/nixlet") / gcroots.owner_of(str(self.root))

    @contextlib.contextmanager
    def serving(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        listening: socket.socket | None = None,
        settings: str = "",
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """A running one, ended in order.

        Args:
            arguments: More options.
            environment: More variables.
            listening: A socket that it is to take over, handed to it as systemd does.
            settings: More lines of its config.toml.
        """
        argv = self.snapshotter(*arguments, settings=settings)
        variables = {**os.environ, "NIX_CONFIG": "substituters =", **(environment or {})}
        if listening is not None:
            # systemd names the process that it hands sockets to; the shell becomes that process.
            handing = f'exec {_HANDED}<&{listening.fileno()}; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
            argv = ["/bin/bash", "-c", handing, "sh", *argv]
        keep = () if listening is None else (listening.fileno(),)
        with self.started(argv, self.socket, variables, keep) as process:
            yield process

    @contextlib.contextmanager
    def started(
        self, argv: Sequence[str], serves: Path, environment: Mapping[str, str], keep: Sequence[int] = ()
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """A program that serves a socket or has ended; ended in order."""
        with (
            self.log.open("ab") as log,
            subprocess.Popen(argv, env=environment, stdout=log, stderr=log, pass_fds=keep) as process,
        ):
            try:
                for _ in range(600):
                    if unixsocket.is_served(str(serves)) or process.poll() is not None:
                        break
                    time.sleep(0.02)
                yield process
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(60)

    @contextlib.contextmanager
    def containerd(self, version: str) -> Iterator[list[str]]:
        """A containerd with a configuration that somebody else wrote; gives the command line of its ctr.

        The configuration has version 2, which all of them read.
        """
        program = parts.containerd(version)
        file = self.directory / "containerd.toml"
        file.write_text(
            f'version = 2\nroot = "{self.directory}/containerd"\nstate = "{self.run}/state"\n'
            f'[grpc]\n  address = "{self.containerd_socket}"\n'
            f'[ttrpc]\n  address = "{self.containerd_socket}.ttrpc"\n'
            f'[plugins."io.containerd.internal.v1.opt"]\n  path = "{self.directory}/opt"\n'
            f'[plugins."io.containerd.nri.v1.nri"]\n  disable = true\n'
            f'[proxy_plugins.nix]\n  type = "snapshot"\n  address = "{self.socket}"\n'
            f'  [proxy_plugins.nix.exports]\n    root = "{self.root}"\n'
        )
        argv = [str(program), f"--config={file}", f"--address={self.containerd_socket}"]
        argv += [f"--root={self.directory}/containerd", f"--state={self.run}/state"]
        # A containerd takes the shim from its path; the one beside it is of its own version.
        environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
        with self.started(argv, self.containerd_socket, environment) as process:
            assert process.poll() is None, self.log.read_text()
            yield [str(program.parent / "ctr"), "-a", str(self.containerd_socket)]

    def snapshotter(self, *arguments: str, settings: str = "") -> list[str]:
        """The command line of a snapshotter with a config.toml as nix-snapshotter has it."""
        file = self.directory / "config.toml"
        file.write_text(
            f'{settings}address = "{self.socket}"\nroot = "{self.root}"\n'
            f'[image_service]\nenable = true\ncontainerd_address = "{self.containerd_socket}"\n'
        )
        return [sys.executable, "-m", "nixlet", "snapshotter", "--config", str(file), *arguments]

    def load(self, image: storeimages.StoreImage, name: str) -> None:
        """Load an image into its containerd."""
        argv = [sys.executable, "-m", "nixlet", "image", "load", "--address", str(self.containerd_socket)]
        argv += ["--namespace", "default", "--ref", name, str(image.archive)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[containerd_snapshots_grpc.SnapshotsStub]:
        """The snapshots service, over a connection of its own."""
        async with channels.connect(str(self.socket)) as channel:
            yield containerd_snapshots_grpc.SnapshotsStub(channel)

    async def listed(self) -> dict[str, pb.Info]:
        """All snapshots by name."""
        async with self.client() as stub:
            return {info.name: info for page in await stub.List(pb.ListSnapshotsRequest()) for info in page.info}

    async def check_nothing_is_for_nothing(self) -> dict[str, pb.Info]:
        """After a cleanup, directories, views and roots are those that the snapshots need; the snapshots."""
        listed = await self.listed()
        async with self.client() as stub:
            await stub.Cleanup(pb.CleanupRequest())
        named = {info.labels.get(label, "") for info in listed.values() for label in (f"{PATH}0", CLOSURE)}
        closures = named - {""}
        assert len(os.listdir(self.root / "snapshots")) == len(listed)
        assert len({name.partition(".")[0] for name in os.listdir(self.root / "views")}) <= len(closures)
        assert len(mounts.below(str(self.root / "views"))) <= len(closures)
        assert len(os.listdir(self.gc_roots) if self.gc_roots.exists() else []) == len(closures)
        return listed


@contextlib.contextmanager
def cleaned_up(number: int, directory: Path) -> Iterator[Alone]:
    """A place whose mounts, roots and sockets are gone afterwards."""
    made = Alone(number, directory)
    made.run.mkdir(parents=True, exist_ok=True)
    try:
        yield made
    finally:
        for pid in nodes.processes_below(made.run):
            os.kill(pid, signal.SIGKILL)
        for entry in reversed([*mounts.below(str(directory)), *mounts.below(str(made.run))]):
            mounts.unmount(entry.path)
        shutil.rmtree(made.gc_roots, ignore_errors=True)
        shutil.rmtree(made.run)
