"""The snapshotter is killed at any moment under load: what it acknowledged is there afterwards, and nothing else is.
A container that runs meanwhile goes on.

NIXLET_CRASHES says how often; the default is a short run.
"""

import asyncio
import contextlib
import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import containerd_snapshots_grpc
from nixlet.rpc.gen import containerd_snapshots_pb2 as pb
from support import alone, storeimages

pytestmark = pytest.mark.slow

CRASHES = int(os.environ.get("NIXLET_CRASHES", "8"))


class Client:
    """One client that makes layers and containers and remembers what was acknowledged.

    A call whose answer was lost may have happened or not; such a key is in doubt, and either is right.
    """

    def __init__(self, number: int, image: storeimages.StoreImage, seed: int) -> None:
        self.number = number
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
        labels = {alone.REF: name}
        if self.random.random() < 0.5:
            labels |= {alone.LAYER: "true"}
            labels |= {f"{alone.PATH}{n}": str(p) for n, p in enumerate(self.image.paths)}
        self.doubtful |= {key, name}
        mounted = (await stub.Prepare(pb.PrepareSnapshotRequest(key=key, labels=labels))).mounts[0]
        Path(mounted.source, "content").write_text(name)
        await stub.Commit(pb.CommitSnapshotRequest(key=key, name=name, labels=labels))
        self.doubtful -= {key, name}
        self.committed[name] = Path(mounted.source).parent.name


@pytest.fixture
def place(tmp_path: Path) -> Iterator[alone.Alone]:
    with alone.cleaned_up(3, tmp_path) as made:
        yield made


async def load(clients: list[Client], place: alone.Alone, process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Let all clients work, and kill the snapshotter under them."""
    async with place.client() as stub:
        tasks = [asyncio.create_task(client.work(stub)) for client in clients]
        await asyncio.sleep(seconds)
        process.kill()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    unexpected = [each for each in results if not isinstance(each, errors.UnavailableError)]
    assert not unexpected, unexpected


async def check(clients: list[Client], place: alone.Alone) -> None:
    """What was acknowledged is there with its content, and no directory, view or root is there for nothing."""
    listed = await place.check_nothing_is_for_nothing()
    async with place.client() as stub:
        for client in clients:
            for name, number in client.committed.items():
                assert listed[name].kind == pb.COMMITTED
                assert (place.root / "snapshots" / number / "fs" / "content").read_text() == name
            for key in client.active:
                assert listed[key].kind == pb.ACTIVE
                assert (await stub.Mounts(pb.MountsRequest(key=key))).mounts
    known = {name for client in clients for name in (*client.committed, *client.active, *client.doubtful)}
    assert {name for name in listed if not name.startswith("default/")} <= known


@contextlib.contextmanager
def running_container(place: alone.Alone, ctr: list[str], image: storeimages.StoreImage) -> Iterator[Callable[[], str]]:
    """A container from a Nix image that runs all the while; gives a function that reads a store path inside it."""
    place.load(image, "localhost/nix:1")
    start = [*ctr, "run", "-d", "--snapshotter", "nix", "localhost/nix:1", "steady", "/bin/sleep", "100000"]
    done = subprocess.run(start, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count = itertools.count()

    def read() -> str:
        look = [*ctr, "task", "exec", "--exec-id", f"look{next(count)}", "steady", "/bin/cat", image.link]
        return subprocess.run(look, capture_output=True, text=True, check=True).stdout

    yield read
    subprocess.run([*ctr, "task", "delete", "--force", "steady"], capture_output=True, check=True)
    with place.serving():
        subprocess.run([*ctr, "container", "delete", "steady"], capture_output=True, check=True)


@pytest.mark.timeout(60 + CRASHES * 10)
async def test_kills_under_load(place: alone.Alone, store_images: dict[int, storeimages.StoreImage]) -> None:
    seed = int(os.environ.get("NIXLET_CRASH_SEED", str(random.randrange(10**6))))
    print(f"seed {seed}")
    chance = random.Random(seed)
    clients = [Client(number, store_images[50], seed) for number in range(4)]
    with contextlib.ExitStack() as stack:
        ctr = stack.enter_context(place.containerd("2.4.2"))
        with place.serving():
            read = stack.enter_context(running_container(place, ctr, store_images[50]))
        for _ in range(CRASHES):
            with place.serving() as process:
                await load(clients, place, process, chance.uniform(0.02, 0.6))
            assert read() == "a plain file\n"
            with place.serving():
                await check(clients, place)
        # And a new one starts, beside the one that ran through it all.
        with place.serving():
            again = [*ctr, "run", "--rm", "--snapshotter", "nix", "localhost/nix:1", "new", "/bin/cat"]
            done = subprocess.run([*again, store_images[50].link], capture_output=True, text=True, check=True)
            assert (done.stdout, read()) == ("a plain file\n", "a plain file\n")
    made = sum(len(client.committed) + len(client.active) for client in clients)
    assert made > CRASHES
