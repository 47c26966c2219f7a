"""Loading where containerd, Nix or whoever asked for it fails: in which order things are done, what is told, and that nothing is left."""

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import os
import random
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.containerd import imagestore, namespaces
from nixlet.images import archive, loader, platforms
from nixlet.store import closures, interface
from nixlet.telemetry import progress
from support import image_archives

NAME = "localhost/a:1"
CLOSURE = {closures.CLOSURE: f"/nix/store/{'0' * 32}-closure-info"}
LAYERS = [image_archives.tar({"f": bytes([number])}) for number in range(3)]

#: What a call of containerd's does before it does its work.
Hook = Callable[..., Awaitable[None]]


@dataclasses.dataclass
class Containerd:
    """An ``ImageStore`` in memory, for faults that a real one doesn't have on demand.

    Attributes:
        hooks: By calls' names; with the blob's digest, or whatever the call is of.
        turns: Says for how many turns of the loop the next call lasts, before and after its work.
        diff_ids: What layers unpack to, by their digests.
        calls: What was called.
        unleased: What was called after the lease was gone.
    """

    hooks: Mapping[str, Hook] = dataclasses.field(default_factory=dict)
    turns: Callable[[], int] = lambda: 1
    diff_ids: dict[str, str] = dataclasses.field(default_factory=dict)
    content: dict[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    active: dict[str, str] = dataclasses.field(default_factory=dict)
    committed: dict[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    records: dict[str, Any] = dataclasses.field(default_factory=dict)
    leases: set[str] = dataclasses.field(default_factory=set)
    calls: list[str] = dataclasses.field(default_factory=list)
    unleased: list[str] = dataclasses.field(default_factory=list)
    lease: str = ""
    namespace: str = namespaces.CRI

    @contextlib.asynccontextmanager
    async def _called(self, call: str, *of: str) -> AsyncIterator[None]:
        self.calls.append(call)
        if self.lease and self.lease not in self.leases:
            self.unleased.append(call)
        if call in self.hooks:
            await self.hooks[call](*of)
        await turn(self.turns())
        yield
        await turn(self.turns())

    @contextlib.asynccontextmanager
    async def leased(self) -> AsyncIterator["Containerd"]:
        lease = os.urandom(4).hex()
        try:
            async with self._called("lease"):
                self.leases.add(lease)
            yield dataclasses.replace(self, lease=lease)
        finally:
            self.leases.discard(lease)

    async def image(self, name: str) -> Any:
        async with self._called("image"):
            return self.records.get(name)

    async def put_image(self, name: str, target: imagestore.Descriptor, labels: Mapping[str, str]) -> None:
        async with self._called("put"):
            self.records[name] = types.SimpleNamespace(name=name, target=target.message(), labels=labels)

    async def create_image(self, name: str, target: imagestore.Descriptor, labels: Mapping[str, str]) -> bool:
        async with self._called("create"):
            if name in self.records:
                return False
            self.records[name] = types.SimpleNamespace(name=name, target=target.message(), labels=labels)
            return True

    async def images(self, wanted: str) -> list[Any]:
        async with self._called("images"):
            return [each for each in self.records.values() if wanted == f"target.digest=={each.target.digest}"]

    async def delete_image(self, record: Any) -> None:
        async with self._called("delete"):
            self.records.pop(record.name, None)

    async def content_labels(self, digest: str) -> Mapping[str, str] | None:
        async with self._called("content"):
            return self.content.get(digest)

    async def write_content(self, digest: str, size: int, chunks: Any, labels: Mapping[str, str]) -> None:
        async with self._called("write", digest), contextlib.aclosing(chunks()) as parts:
            written = 0
            async for part in parts:
                async with self._called("chunk", digest):
                    written += len(part)
            assert written == size
            self.content[digest] = labels

    async def snapshot(self, _snapshotter: str, name: str) -> Any:
        async with self._called("snapshot"):
            return types.SimpleNamespace(labels=self.committed[name]) if name in self.committed else None

    hold_snapshot = snapshot

    async def prepare_snapshot(self, _snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> list[Any]:
        async with self._called("prepare"):
            if labels["containerd.io/snapshot.ref"] in self.committed:
                raise errors.AlreadyExistsError("it is there")
            assert not parent or parent in self.committed
        # What was prepared for somebody who hears nothing of it goes with the lease.
        self.active[key] = parent
        return []

    async def apply(self, layer: imagestore.Descriptor, _mounts: list[Any]) -> str:
        async with self._called("apply", layer.digest):
            assert layer.digest in self.content
            return self.diff_ids[layer.digest]

    async def commit_snapshot(self, _snapshotter: str, name: str, key: str, labels: Mapping[str, str]) -> None:
        async with self._called("commit"):
            if name in self.committed:
                raise errors.AlreadyExistsError("it is there")
            del self.active[key]
            self.committed[name] = labels

    async def remove_snapshot(self, _snapshotter: str, key: str) -> None:
        async with self._called("remove"):
            self.active.pop(key, None)


class Nix:
    """A realiser: how it brings what layers name is the test's affair."""

    store_dir = "/nix/store"

    def __init__(self, bring: Hook) -> None:
        self._bring = bring
        self.held = 0

    @contextlib.asynccontextmanager
    async def all_realised(self, named: list[Any], _sink: progress.ProgressSink) -> AsyncIterator[dict[str, Any]]:
        await self._bring()
        self.held += 1
        try:
            yield {each.identity: types.SimpleNamespace(members=(), took=interface.Realised()) for each in named}
        finally:
            self.held -= 1


async def turn(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def at_once(*_: str) -> None:
    """Nothing that takes time."""


async def hang(*_: str) -> None:
    await asyncio.Event().wait()


def failing(error: errors.NixletError) -> Hook:
    async def fail(*_: str) -> None:
        raise error

    return fail


def failing_when_cancelled(error: errors.NixletError) -> Hook:
    """As a connection does that somebody closes meanwhile."""

    async def fail(*_: str) -> None:
        try:
            await turn(20)
        except asyncio.CancelledError:
            raise error from None

    return fail


#: What copies do when they are given up.
GIVEN_UP = {
    "end": at_once,
    "are cut off": failing_when_cancelled(errors.UnavailableError("it was cut off")),
    "fail": failing_when_cancelled(errors.DeadlineExceededError("it took too long")),
}


@dataclasses.dataclass
class Image:
    """An image in its open archive, whose first layer names a closure."""

    source: archive.Archive
    image: archive.ArchiveImage
    diff_ids: dict[str, str]

    @property
    def id(self) -> str:
        return self.image.manifest.config.digest

    def containerd(self, **hooks: Hook) -> Containerd:
        """An empty one that can unpack it."""
        return Containerd(hooks, diff_ids=self.diff_ids)

    async def load(self, containerd: Containerd, nix: Nix, *names: str) -> loader.Loaded:
        loads = loader.Loader(containerd, "nix", nix)  # type: ignore[arg-type]  # what loading asks of them
        return await loads.load(self.source, self.image, names or [NAME])


@contextlib.contextmanager
def opened(directory: Path, *layers: bytes, notes: Mapping[str, str] = CLOSURE) -> Iterator[Image]:
    path = directory / "a.tar"
    path.write_bytes(image_archives.tar(image_archives.oci(layers, annotations=[dict(notes)])))
    with archive.open_archive(str(path)) as source:
        image = source.image(platforms.host_platform())
        yield Image(source, image, {layer.descriptor.digest: layer.diff_id for layer in image.layers})


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    """One that has a layer twice."""
    with opened(tmp_path, *LAYERS, LAYERS[0]) as found:
        yield found


def left(containerd: Containerd, nix: Nix) -> list[object]:
    """What a load left behind besides what containerd's collector takes."""
    tasks = [task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}]
    return [*containerd.active, *containerd.leases, *containerd.unleased, *["held"] * nix.held, *tasks]


async def test_blobs_are_copied_while_paths_are_realised(image: Image) -> None:
    """Nothing else: unpacking needs the paths, and a record everything."""

    async def bring() -> None:
        async with asyncio.timeout(30):
            # With its configuration and its manifest.
            while len(containerd.content) < len(LAYERS) + 2:
                await asyncio.sleep(0)
        assert not containerd.active
        assert "prepare" not in containerd.calls

    containerd, nix = image.containerd(), Nix(bring)
    await image.load(containerd, nix)
    counts = collections.Counter(containerd.calls)
    assert (counts["lease"], counts["write"], counts["apply"], counts["put"]) == (1, 5, 4, 1)
    assert containerd.calls[-1] == "put"
    assert len(containerd.committed) == 4
    assert list(containerd.records) == [image.id, NAME]
    assert left(containerd, nix) == []


async def test_a_layer_is_unpacked_while_others_are_copied(image: Image) -> None:
    done = asyncio.Event()

    async def unpacked(digest: str) -> None:
        if digest == image.image.layers[0].descriptor.digest:
            done.set()

    async def written(digest: str) -> None:
        if digest == image.image.layers[1].descriptor.digest:
            await asyncio.wait_for(done.wait(), 30)

    containerd, nix = image.containerd(apply=unpacked, write=written), Nix(at_once)
    await image.load(containerd, nix)
    assert left(containerd, nix) == []


@pytest.mark.parametrize("again", [(), (1,), (2, 3), (7, 1, 1)], ids=str)
@pytest.mark.parametrize("write", GIVEN_UP.values(), ids=GIVEN_UP)
async def test_a_cancel_at_every_turn_of_the_loop(image: Image, again: tuple[int, ...], write: Hook) -> None:
    """Once, and once more while it is heeded, so many turns later."""
    for moment in itertools.count(1):
        containerd, nix = image.containerd(write=write), Nix(lambda: turn(5))
        task = asyncio.create_task(image.load(containerd, nix))
        await turn(moment)
        if task.done():
            assert moment > 50
            assert list(containerd.records) == [image.id, NAME]
            break
        task.cancel()
        for turns in again:
            await turn(turns)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), moment
        assert left(containerd, nix) == [], moment
        # By its ID alone nobody would know it.
        assert not containerd.records or NAME in containerd.records, moment


@pytest.mark.parametrize("call", ["lease", "write", "chunk", "prepare", "apply", "commit", "put"])
@pytest.mark.parametrize("at", [1, 2, 4])
async def test_a_call_that_fails_is_told_and_nothing_is_left(image: Image, call: str, at: int) -> None:
    count = 0

    async def fail(*_: str) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise errors.ResourceExhaustedError(call)

    for seed in range(10):
        count, chance = 0, random.Random(seed)
        containerd, nix = image.containerd(**{call: fail}), Nix(lambda: turn(5))
        containerd.turns = lambda chance=chance: chance.randrange(4)  # type: ignore[misc]  # bound here
        if call in {"lease", "put"} and at > 1:
            await image.load(containerd, nix)
        else:
            with pytest.raises(errors.ResourceExhaustedError, match=call):
                await image.load(containerd, nix)
            assert containerd.records == {}
        assert left(containerd, nix) == []


@pytest.mark.parametrize("has", ["a name by now", "its ID before"])
async def test_a_record_that_others_need_stays_when_a_name_cant_be_had(image: Image, has: str) -> None:
    count = 0

    async def put(*_: str) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise errors.ResourceExhaustedError("no room")

    containerd, nix = image.containerd(put=put), Nix(at_once)
    names = ["localhost/first:1", NAME]
    if has == "its ID before":
        await containerd.create_image(image.id, _target(image), {})
        count, names = 1, [NAME]
    with pytest.raises(errors.ResourceExhaustedError):
        await image.load(containerd, nix, *names)
    assert list(containerd.records) == [image.id, *names[:-1]]
    assert left(containerd, nix) == []


def _target(image: Image) -> imagestore.Descriptor:
    described = image.image.descriptor
    return imagestore.Descriptor(described.media_type, described.digest, described.size)


@pytest.mark.parametrize("undoing", ["remove", "images"])
async def test_who_gives_up_does_not_wait_for_a_containerd_that_is_silent(
    image: Image, monkeypatch: pytest.MonkeyPatch, undoing: str
) -> None:
    """As a node that is to end: containerd isn't asked to before."""
    monkeypatch.setattr(loader, "_UNDO_TIMEOUT", 0.05)
    last = {"remove": "apply", "images": "put"}[undoing]
    containerd, nix = image.containerd(**{last: hang, undoing: hang}), Nix(at_once)
    task = asyncio.create_task(image.load(containerd, nix))
    async with asyncio.timeout(30):
        while last not in containerd.calls:
            await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=30)
    assert task.cancelled()
    assert undoing in containerd.calls
    # What is left goes with the lease.
    containerd.active.clear()
    assert left(containerd, nix) == []


async def test_a_copy_that_fails_doesnt_wait_for_nix(image: Image) -> None:
    full = errors.ResourceExhaustedError("no space left on device")
    full.__cause__ = OSError("the disk's word")
    containerd, nix = image.containerd(write=failing(full)), Nix(hang)
    with pytest.raises(errors.ResourceExhaustedError, match="no space left") as caught:
        await asyncio.wait_for(image.load(containerd, nix), 30)
    assert str(caught.value.__cause__) == "the disk's word"
    assert left(containerd, nix) == []


@pytest.mark.parametrize("write", [hang, *GIVEN_UP.values()], ids=["hang", *GIVEN_UP])
async def test_what_nix_refuses_is_told_rather_than_what_copies_say_to_it(image: Image, write: Hook) -> None:
    containerd, nix = image.containerd(write=write), Nix(failing(errors.NotFoundError("nobody has the path")))
    with pytest.raises(errors.NotFoundError, match="nobody has the path"):
        await asyncio.wait_for(image.load(containerd, nix), 30)
    assert left(containerd, nix) == []


async def test_containerd_may_be_started_again_while_paths_are_realised(image: Image) -> None:
    away = True

    async def write(*_: str) -> None:
        if away:
            raise errors.UnavailableError("containerd can't be reached")

    async def bring() -> None:
        nonlocal away
        while containerd.calls.count("write") < 5:
            await asyncio.sleep(0)
        await turn(20)
        away = False

    containerd, nix = image.containerd(write=write), Nix(bring)
    await asyncio.wait_for(image.load(containerd, nix), 30)
    assert containerd.calls.count("write") == 10
    assert list(containerd.records) == [image.id, NAME]
    assert left(containerd, nix) == []


async def test_a_containerd_that_stays_away_is_told(image: Image) -> None:
    containerd, nix = image.containerd(write=failing(errors.UnavailableError("can't be reached"))), Nix(at_once)
    with pytest.raises(errors.UnavailableError, match="can't be reached"):
        await image.load(containerd, nix)
    assert left(containerd, nix) == []


async def test_what_somebody_else_unpacks_while_it_is_copied_is_not_unpacked_again(tmp_path: Path) -> None:
    first_is_done = asyncio.Event()
    writers = 0

    async def write(digest: str) -> None:
        nonlocal writers
        if digest in image.diff_ids:
            writers += 1
            if writers == 2:
                await asyncio.wait_for(first_is_done.wait(), 30)

    async def prepared_by_both(*_: str) -> None:
        async with asyncio.timeout(30):
            while containerd.calls.count("prepare") < 2:
                await asyncio.sleep(0)
        await turn(5)

    with opened(tmp_path, LAYERS[0]) as image:
        containerd, nix = image.containerd(write=write, chunk=at_once, apply=prepared_by_both), Nix(at_once)

        async def load(name: str) -> None:
            await image.load(containerd, nix, name)
            first_is_done.set()

        await asyncio.gather(load("localhost/a:1"), load("localhost/b:1"))
    assert containerd.calls.count("apply") == 1
    assert sorted(containerd.records) == ["localhost/a:1", "localhost/b:1", image.id]
    assert left(containerd, nix) == []


@pytest.mark.parametrize("seed", range(20))
async def test_two_load_the_same_layers_at_once(image: Image, seed: int) -> None:
    chance = random.Random(seed)
    containerd, nix = image.containerd(), Nix(lambda: turn(chance.randrange(9)))
    containerd.turns = lambda: chance.randrange(6)
    await asyncio.gather(*(image.load(containerd, nix, f"localhost/{name}:1") for name in "ab"))
    assert len(containerd.committed) == 4
    assert 4 <= containerd.calls.count("apply") <= 8
    assert left(containerd, nix) == []


async def test_only_a_snapshot_that_exists_is_somebody_elses(image: Image) -> None:
    """A copy may say that something exists as well."""
    containerd, nix = image.containerd(write=failing(errors.AlreadyExistsError("a blob"))), Nix(at_once)
    with pytest.raises(errors.AlreadyExistsError, match="a blob"):
        await image.load(containerd, nix)
    assert containerd.calls.count("prepare") <= 1
    assert left(containerd, nix) == []


@pytest.mark.parametrize(
    ("notes", "able", "refusal", "says"),
    [
        (CLOSURE, False, errors.FailedPreconditionError, "the snapshotter native can't run"),
        ({closures.CLOSURE: "/etc/passwd"}, True, errors.InvalidArgumentError, "/etc/passwd"),
    ],
)
async def test_what_can_be_refused_without_asking_is(
    tmp_path: Path, notes: Mapping[str, str], *, able: bool, refusal: type[Exception], says: str
) -> None:
    with opened(tmp_path, *LAYERS, notes=notes) as image:
        containerd = image.containerd()
        loads = loader.Loader(containerd, "native", Nix(hang) if able else None)  # type: ignore[arg-type]  # what loading asks of them
        with pytest.raises(refusal, match=says):
            await loads.load(image.source, image.image, [NAME])
        with pytest.raises(refusal, match=says):
            await loads.unpack(image.image.manifest, image.image.config)
    assert containerd.calls == []
