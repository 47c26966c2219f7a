"""What loading images relies on in the real containerds: leases, content that is there already, records, layers."""

import asyncio
import gzip
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import archive, loader, model, platforms
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import (
    containerd_content_grpc,
    containerd_content_pb2,
    containerd_leases_grpc,
    containerd_leases_pb2,
)
from nixlet.telemetry import progress
from support import containerds, image_archives, parts

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
            assert image_archives.digest(await store.read_content(layer.digest)) == layer.digest
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
            async with containerds.store(channel).leased():
                assert {"other", "elsewhere", "unlabelled"} < await leases(channel)
            other.communicate()
        async with containerds.store(channel).leased():
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
            assert await here.read_content(digest) == SHARED


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


async def delete_content(channel: channels.Channel, digest: str) -> None:
    """Delete a blob, also from the disk, where it would be found again."""
    request = containerd_content_pb2.DeleteContentRequest(digest=digest)
    await containerd_content_grpc.ContentStub(channel).Delete(request, metadata=METADATA)
    stub = containerd_leases_grpc.LeasesStub(channel)
    await stub.Create(containerd_leases_pb2.CreateRequest(id="collect"), metadata=METADATA)
    await stub.Delete(containerd_leases_pb2.DeleteRequest(id="collect", sync=True), metadata=METADATA)
