"""What loading images relies on in the real containerds: leases, content that is there already, records, layers."""

import asyncio
import gzip
import os
import shutil
import subprocess
import sys
import types
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import archive, loader, model, opening, platforms
from nixlet.node.images import preload
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import (
    containerd_content_grpc,
    containerd_content_pb2,
    containerd_leases_grpc,
    containerd_leases_pb2,
)
from nixlet.telemetry import progress
from support import containerds, disks, image_archives, parts

METADATA = {"containerd-namespace": "k8s.io"}
ALL = pytest.mark.parametrize("version", parts.CONTAINERDS)

#: Larger than one message, so that two writers take turns.
SHARED = image_archives.tar({"shared": os.urandom(3 << 20)})


def image_file(directory: Path, name: str, *layers: bytes) -> Path:
    """An image of its own configuration."""
    path = directory / f"{name}.tar"
    path.write_bytes(image_archives.tar(image_archives.oci(layers, config={"Labels": {"name": name}})))
    return path


async def load(
    channel: channels.Channel, path: Path, name: str, sink: progress.ProgressSink = progress.ignore
) -> archive.ArchiveImage:
    with archive.open_archive(str(path)) as source:
        image = source.image(platforms.host_platform())
        await loader.Loader(containerds.store(channel), containerds.SNAPSHOTTER).load(source, image, [name], sink=sink)
        return image


async def leases(channel: channels.Channel) -> set[str]:
    stub = containerd_leases_grpc.LeasesStub(channel)
    return {each.id for each in (await stub.List(containerd_leases_pb2.ListRequest(), metadata=METADATA)).leases}


@ALL
async def test_images_that_share_a_layer_are_loaded_at_once(version: str, tmp_path: Path) -> None:
    names = [f"localhost/{number}:1" for number in range(6)]
    paths = [image_file(tmp_path, str(number), SHARED, b"") for number in range(6)]
    async with containerds.running(version, tmp_path) as channel:
        await asyncio.gather(*(load(channel, path, name) for path, name in zip(paths, names, strict=True)))
        store = containerds.store(channel)
        assert all([await store.image(name) for name in names])
        assert await leases(channel) == set()


@ALL
async def test_what_is_there_already_is_kept_while_it_is_used(version: str, tmp_path: Path) -> None:
    """Somebody removes the only other image that has a layer, when a load has gone past that layer."""
    first, second = image_file(tmp_path, "first", SHARED), image_file(tmp_path, "second", SHARED, b"")
    ctr = [str(parts.containerd(version).parent / "ctr"), "-a", f"{tmp_path}/c.sock", "-n", "k8s.io"]
    async with containerds.running(version, tmp_path) as channel:
        await load(channel, first, "localhost/first:1")

        def remove_the_first(step: progress.Progress) -> None:
            if step.done == 1:
                subprocess.run([*ctr, "images", "rm", "--sync", "localhost/first:1"], check=True, capture_output=True)

        image = await load(channel, second, "localhost/second:1", remove_the_first)
        store = containerds.store(channel)
        assert await store.image("localhost/first:1") is None
        for layer in image.manifest.layers:
            assert image_archives.digest(await store.read_content(layer.digest, 8 << 20)) == layer.digest
        for name in model.chain_ids([layer.diff_id for layer in image.layers]):
            assert await store.snapshot(containerds.SNAPSHOTTER, name) is not None


@ALL
async def test_a_dead_holders_lease_is_deleted_and_others_are_not(version: str, tmp_path: Path) -> None:
    holder = "import os, sys\nfrom nixlet.host import procfs\nprint(procfs.mark_of(os.getpid()), flush=True)\nsys.stdin.read()"
    async with containerds.running(version, tmp_path) as channel:
        stub = containerd_leases_grpc.LeasesStub(channel)

        async def make(name: str, labels: dict[str, str]) -> None:
            await stub.Create(containerd_leases_pb2.CreateRequest(id=name, labels=labels), metadata=METADATA)

        with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            mark = other.stdout.readline().decode().strip()
            await make("other", {"io.nixlet.holder": mark})
            await make("elsewhere", {"io.nixlet.holder": mark.replace("pid:[", "pid:[1")})
            await make("unlabelled", {})
            store = containerds.store(channel)
            async with store.leased():
                assert {"other", "elsewhere", "unlabelled"} < await leases(channel)
            other.communicate()
        # The same client finds it, which lives as long as the node.
        async with store.leased():
            assert await leases(channel) > {"elsewhere", "unlabelled"}
            assert "other" not in await leases(channel)
        assert await leases(channel) == {"elsewhere", "unlabelled"}


@ALL
async def test_content_that_another_namespace_has_is_not_read_again(version: str, tmp_path: Path) -> None:
    def never() -> AsyncIterator[bytes]:
        raise AssertionError

    async def whole() -> AsyncIterator[bytes]:
        yield SHARED

    digest = image_archives.digest(SHARED)
    async with containerds.running(version, tmp_path) as channel:
        elsewhere = imagestore.ImageStore(channel, "containerd", "elsewhere")
        async with elsewhere.leased() as there, containerds.store(channel).leased() as here:
            await there.write_content(digest, len(SHARED), whole, {})
            for _ in range(2):
                await here.write_content(digest, len(SHARED), never, {})
            assert await here.read_content(digest, 8 << 20) == SHARED


@ALL
async def test_a_name_with_another_images_digest_is_refused(version: str, tmp_path: Path) -> None:
    async with containerds.running(version, tmp_path) as channel:
        path = image_file(tmp_path, "a", b"")
        with pytest.raises(errors.InvalidArgumentError, match="can't be loaded as localhost/a@sha256:0000"):
            await load(channel, path, f"localhost/a@sha256:{'0' * 64}")
        image = await load(channel, path, "localhost/a:1")
        await load(channel, path, f"localhost/a@{image.descriptor.digest}")


@ALL
async def test_an_archive_that_was_loaded_before_is_not_needed_again(version: str, tmp_path: Path) -> None:
    name = "localhost/a:1"
    async with containerds.running(version, tmp_path) as channel:
        store = containerds.store(channel)
        loads = loader.Loader(store, containerds.SNAPSHOTTER)

        async def again(origin: str = "one") -> loader.Loaded | None:
            return await loads.load_again(name, origin, progress.ignore)

        async def loaded(path: Path) -> loader.Loaded:
            with archive.open_archive(str(path)) as source:
                image = source.image(platforms.host_platform())
                labels = loader.came_from("one", image.descriptor.digest)
                return await loads.load(source, image, [name], labels=labels)

        assert await again() is None
        first = await loaded(image_file(tmp_path, "first", SHARED))
        assert await again() == first
        assert await again("another") is None
        # Somebody gives the name to another image.
        await load(channel, image_file(tmp_path, "second", SHARED), name)
        assert await again() is None
        # Something of it is gone.
        await loaded(image_file(tmp_path, "first", SHARED))
        await delete_content(channel, image_archives.digest(gzip.compress(SHARED, mtime=0)))
        assert await again() is None
        await loaded(image_file(tmp_path, "first", SHARED))
        assert await again() == first
        await store.remove_snapshot(containerds.SNAPSHOTTER, image_archives.digest(SHARED))
        assert await again() is None


@ALL
async def test_what_is_there_already_is_only_looked_at(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whatever of it is gone is there again after the next load."""
    name, path, digest = "localhost/a:1", image_file(tmp_path, "a", SHARED), image_archives.digest(SHARED)
    made: list[str] = []
    leased = imagestore.ImageStore.leased

    def counted(self: imagestore.ImageStore) -> Any:
        made.append("lease")
        return leased(self)

    monkeypatch.setattr(imagestore.ImageStore, "leased", counted)
    async with containerds.running(version, tmp_path) as channel:
        store = containerds.store(channel)

        async def loads() -> int:
            made.clear()
            await load(channel, path, name)
            return len(made)

        async def forget_snapshots() -> None:
            image = await load(channel, path, name)
            needing = {f"containerd.io/gc.ref.snapshot.{containerds.SNAPSHOTTER}": ""}
            await store.label_content(image.manifest.config.digest, needing)

        async def forget_that_it_is_an_image() -> None:
            record = await store.image(name)
            assert record is not None
            await store.label_image(record, dict.fromkeys(loader.MANAGED, ""))

        async def forget_content() -> None:
            await delete_content(channel, image_archives.digest(gzip.compress(SHARED, mtime=0)))

        async def forget_layer() -> None:
            await store.remove_snapshot(containerds.SNAPSHOTTER, digest)

        assert [await loads(), await loads()] == [1, 0]
        for spoil in (forget_snapshots, forget_that_it_is_an_image, forget_content, forget_layer):
            await spoil()
            assert [await loads(), await loads()] == [1, 0], spoil.__name__
        assert await store.snapshot(containerds.SNAPSHOTTER, digest) is not None
        await load(channel, path, "localhost/other:1")
        assert await store.image("localhost/other:1") is not None


@ALL
async def test_layers_that_the_snapshotter_has_lost_are_unpacked_again(version: str, tmp_path: Path) -> None:
    """Also where others that are lost stand upon them; those that nobody knows of stay in the way, which is told."""
    first = image_file(tmp_path, "first", SHARED, b"")
    second = image_file(tmp_path, "second", SHARED, image_archives.tar({"x": b"x"}))
    base = image_archives.digest(SHARED)

    def lose() -> None:
        shutil.rmtree(tmp_path / "root/io.containerd.snapshotter.v1.native")

    async with containerds.running(version, tmp_path) as channel:
        await load(channel, first, "localhost/first:1")
        await load(channel, second, "localhost/second:1")
    lose()
    async with containerds.running(version, tmp_path) as channel:
        store = containerds.store(channel)
        assert await store.snapshot(containerds.SNAPSHOTTER, base) is None
        image = await load(channel, first, "localhost/first:1")
        for name in model.chain_ids([layer.diff_id for layer in image.layers]):
            assert await store.snapshot(containerds.SNAPSHOTTER, name) is not None
        await load(channel, second, "localhost/second:1")
        await store.prepare_snapshot(containerds.SNAPSHOTTER, "unheard of", base, {"containerd.io/gc.root": "x"})
    lose()
    async with containerds.running(version, tmp_path) as channel:
        with pytest.raises(
            errors.FailedPreconditionError, match=f"knows the layer {base}, which the snapshotter native"
        ):
            await load(channel, first, "localhost/first:1")
        assert await leases(channel) == set()


async def delete_content(channel: channels.Channel, digest: str) -> None:
    """Delete a blob, also from the disk, where it would be found again."""
    request = containerd_content_pb2.DeleteContentRequest(digest=digest)
    await containerd_content_grpc.ContentStub(channel).Delete(request, metadata=METADATA)
    stub = containerd_leases_grpc.LeasesStub(channel)
    await stub.Create(containerd_leases_pb2.CreateRequest(id="collect"), metadata=METADATA)
    await stub.Delete(containerd_leases_pb2.DeleteRequest(id="collect", sync=True), metadata=METADATA)


@ALL
@pytest.mark.parametrize("layer", [os.urandom(24 << 20), bytes(64 << 20)], ids=["content", "unpacked"])
async def test_a_full_disk_is_told_as_one(version: str, tmp_path: Path, layer: bytes) -> None:
    """So that whoever loads tries again when there is room."""
    path = image_file(tmp_path, "large", image_archives.tar({"file": layer}))
    with disks.disk("tmpfs", tmp_path / "small", 16) as small:
        async with containerds.running(version, small) as channel:
            with pytest.raises(errors.ResourceExhaustedError, match="no space left on device"):
                await load(channel, path, "localhost/large:1")
            assert await leases(channel) == set()
            subprocess.run(["mount", "-o", "remount,size=256m", str(small)], check=True)
            await load(channel, path, "localhost/large:1")


class ShowsAll:
    """CRI, which this containerd is without: it shows whatever the image store has."""

    def __init__(self, store: imagestore.ImageStore) -> None:
        self._store = store

    async def status(self, name: str) -> object:
        record = await self._store.image(name)
        assert record is not None
        manifest = model.decode(await self._store.read_content(record.target.digest, 8 << 20), model.Manifest, name)
        return types.SimpleNamespace(id=manifest.config.digest)


@pytest.mark.parametrize("version", parts.CONTAINERDS[-1:])
async def test_no_further_name_is_taken_from_an_image(version: str, tmp_path: Path) -> None:
    """Be that image imported before or after the one that would get the name besides."""
    directory = tmp_path / "images"
    directory.mkdir()

    def write(file: str, name: str, content: bytes) -> str:
        data = image_archives.oci([image_archives.tar({"file": content})], name=name)
        (directory / f"{file}.tar").write_bytes(image_archives.tar(data))
        return image_archives.digest(
            next(data[place] for place in data if image_archives.digest(data[place]).encode() in data["index.json"])
        )

    async with containerds.running(version, tmp_path) as channel:
        store = containerds.store(channel)
        loads, opener = loader.Loader(store, containerds.SNAPSHOTTER), opening.Opener(str(tmp_path))

        async def start() -> dict[str, str]:
            shown: Any = ShowsAll(store)
            nobody: Any = None
            await preload.Preload(str(directory), loads, store, shown, opener, nobody, ["r.example"]).start()
            # By digests and IDs they are recorded besides.
            found = {image.name: image.target.digest for image in await store.images()}
            return {name: digest for name, digest in found.items() if "sha256:" not in name}

        first = write("1", "docker.io/library/a:1", b"further")
        own = write("2", "r.example/library/a:1", b"own")
        before = write("3", "r.example/library/b:1", b"own, before")
        after = write("4", "docker.io/library/b:1", b"further, after")
        follows = write("5", "docker.io/library/c:1", b"it follows")
        expected = {
            "docker.io/library/a:1": first,
            "r.example/library/a:1": own,
            "r.example/library/b:1": before,
            "docker.io/library/b:1": after,
            "docker.io/library/c:1": follows,
            "r.example/library/c:1": follows,
        }
        assert await start() == expected
        assert await start() == expected
        changed = write("5", "docker.io/library/c:1", b"it follows when that changes")
        assert await start() == {**expected, "docker.io/library/c:1": changed, "r.example/library/c:1": changed}
        # Another image whose further name is the same gets it once the first isn't preloaded any more.
        (directory / "5.tar").unlink()
        other = write("6", "quay.io/library/c:1", b"another")
        assert (await start())["r.example/library/c:1"] == other
