"""The snapshotter is killed at any moment under load: what it acknowledged is there afterwards, and nothing else is.

NIXLET_CRASHES says how often; the default is a short run.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.host import mounts
from nixlet.node import stand
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import containerd_snapshots_grpc
from nixlet.rpc.gen import containerd_snapshots_pb2 as pb
from support import storeimages

CRASHES = int(os.environ.get("NIXLET_CRASHES", "8"))
DIRECTORY = Path("/run/nixlet-test/3")
REF = "containerd.io/snapshot.ref"


class Client:
    """One client that makes layers and containers and remembers what was acknowledged.

    A call whose answer was lost may have happened or not; such a key is in doubt, and either is right.
    """

    def __init__(self, number: int, root: Path, image: storeimages.StoreImage, seed: int) -> None:
        self.number = number
        self.root = root
        self.image = image
        self.random = random.Random(seed * 1000 + number)
        self.committed: dict[str, str] = {}
        self.active: set[str] = set()
        self.doubtful: set[str] = set()
        self.count = 0

    async def work(self, stub: containerd_snapshots_grpc.SnapshotsStub) -> None:
        with channels.translated("the snapshotter"):
            while True:
                await self._step(stub)

    async def _step(self, stub: containerd_snapshots_grpc.SnapshotsStub) -> None:
        self.count += 1
        unique = f"{self.number}-{self.count}-{self.random.randrange(10**9)}"
        choice = self.random.random()
        if choice < 0.5 or not self.committed:
            await self._layer(stub, unique)
        elif choice < 0.8:
            key = f"container-{unique}"
            self.doubtful.add(key)
            parent = self.random.choice(sorted(self.committed))
            await stub.Prepare(pb.PrepareSnapshotRequest(key=key, parent=parent))
            self.doubtful.discard(key)
            self.active.add(key)
        elif self.active:
            key = self.random.choice(sorted(self.active))
            self.active.discard(key)
            self.doubtful.add(key)
            await stub.Remove(pb.RemoveSnapshotRequest(key=key))
            self.doubtful.discard(key)

    async def _layer(self, stub: containerd_snapshots_grpc.SnapshotsStub, unique: str) -> None:
        """Unpack a layer: a Nix layer every other time."""
        key, name = f"ns/1/extract-{unique}", f"layer-{unique}"
        labels = {REF: name}
        if self.random.random() < 0.5:
            labels |= {"containerd.io/snapshot/nix-layer": "true"}
            labels |= {f"containerd.io/snapshot/nix-store-path.{n}": str(p) for n, p in enumerate(self.image.paths)}
        self.doubtful |= {key, name}
        mounted = (await stub.Prepare(pb.PrepareSnapshotRequest(key=key, labels=labels))).mounts[0]
        Path(mounted.source, "content").write_text(name)
        await stub.Commit(pb.CommitSnapshotRequest(key=key, name=name, labels=labels))
        self.doubtful -= {key, name}
        self.committed[name] = Path(mounted.source).parent.name


@contextlib.contextmanager
def serving(root: Path) -> Iterator["subprocess.Popen[bytes]"]:
    argv = [sys.executable, "-m", "nixlet", "snapshotter", "--root", str(root), "--address", f"{DIRECTORY}/s.sock"]
    with (root.parent / "log").open("ab") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            for _ in range(600):
                if server.is_served(f"{DIRECTORY}/s.sock"):
                    break
                assert process.poll() is None, (root.parent / "log").read_text()
                time.sleep(0.02)
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    yield tmp_path / "root"
    for entry in reversed(mounts.below(str(tmp_path))):
        mounts.unmount(entry.path)
    shutil.rmtree(Path("/nix/var/nix/gcroots/nixlet") / stand.roots_owner(str(tmp_path / "root")), ignore_errors=True)
    shutil.rmtree(DIRECTORY)


async def load(clients: list[Client], process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Let all clients work, and kill the snapshotter under them."""
    async with channels.connect(f"{DIRECTORY}/s.sock") as channel:
        stub = containerd_snapshots_grpc.SnapshotsStub(channel)
        tasks = [asyncio.create_task(client.work(stub)) for client in clients]
        await asyncio.sleep(seconds)
        process.kill()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    unexpected = [each for each in results if not isinstance(each, errors.UnavailableError)]
    assert not unexpected, unexpected


async def check(clients: list[Client], root: Path) -> None:
    """What was acknowledged is there with its content, and no directory, view or root is there for nothing."""
    async with channels.connect(f"{DIRECTORY}/s.sock") as channel:
        stub = containerd_snapshots_grpc.SnapshotsStub(channel)
        listed = {info.name: info for page in await stub.List(pb.ListSnapshotsRequest()) for info in page.info}
        for client in clients:
            for name, number in client.committed.items():
                assert listed[name].kind == pb.COMMITTED
                assert (root / "snapshots" / number / "fs" / "content").read_text() == name
            for key in client.active:
                assert listed[key].kind == pb.ACTIVE
                assert (await stub.Mounts(pb.MountsRequest(key=key))).mounts
        known = {name for client in clients for name in (*client.committed, *client.active, *client.doubtful)}
        assert set(listed) <= known
        await stub.Cleanup(pb.CleanupRequest())
    assert len(os.listdir(root / "snapshots")) == len(listed)
    closures = {info.labels.get("containerd.io/snapshot/nix-store-path.0", "") for info in listed.values()} - {""}
    assert len(mounts.below(str(root / "views"))) <= len(closures)
    kept = Path("/nix/var/nix/gcroots/nixlet") / stand.roots_owner(str(root))
    assert len(list(kept.iterdir()) if kept.exists() else []) == len(closures)


@pytest.mark.timeout(60 + CRASHES * 10)
async def test_kills_under_load(root: Path, store_images: dict[int, storeimages.StoreImage]) -> None:
    seed = int(os.environ.get("NIXLET_CRASH_SEED", str(random.randrange(10**6))))
    print(f"seed {seed}")
    chance = random.Random(seed)
    clients = [Client(number, root, store_images[50], seed) for number in range(4)]
    for _ in range(CRASHES):
        with serving(root) as process:
            await load(clients, process, chance.uniform(0.02, 0.6))
        with serving(root):
            await check(clients, root)
    done = sum(len(client.committed) + len(client.active) for client in clients)
    assert done > CRASHES
