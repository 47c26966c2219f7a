"""Real containerds for tests, with all that is theirs below a directory; snapshotter: native."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from google.protobuf import empty_pb2

from nixlet.containerd import config, imagestore
from nixlet.host import process
from nixlet.rpc import channel as channels
from nixlet.rpc.gen import containerd_version_grpc, cri_grpc
from nixlet.rpc.gen import cri_pb2 as pb
from support import image_archives, parts

#: The snapshotter that every machine has.
SNAPSHOTTER = "native"

_CRI = ("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime")


@contextlib.asynccontextmanager
async def running(version: str, directory: Path) -> AsyncIterator[channels.Channel]:
    """A containerd of a version without CRI, for what only its image store is needed for."""
    file, socket = directory / "config.toml", f"{directory}/c.sock"
    file.write_text(
        # Version 2 is read by all of them.
        f'version = 2\nroot = "{directory}/root"\nstate = "{directory}/state"\ndisabled_plugins = {list(_CRI)}\n'
        f'[grpc]\n  address = "{socket}"\n[ttrpc]\n  address = "{socket}.ttrpc"\n'
        f'[plugins."io.containerd.internal.v1.opt"]\n  path = "{directory}/opt"\n'
        f'[plugins."io.containerd.nri.v1.nri"]\n  disable = true\n'
    )
    argv = [str(parts.containerd(version)), f"--config={file}"]
    environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    with (directory / "log").open("wb") as log:
        async with (
            process.start(argv, env=environment, stdout=log.fileno(), stderr=process.STDOUT, grace=20),
            channels.connect(socket) as channel,
        ):
            async with asyncio.timeout(30):
                await channels.wait_until_answered(store(channel).version)
            yield channel


def store(channel: channels.Channel) -> imagestore.ImageStore:
    """A client of its image store."""
    return imagestore.ImageStore(channel, "containerd")


@contextlib.asynccontextmanager
async def filled(directory: Path, *blobs: bytes) -> AsyncIterator[imagestore.ImageStore]:
    """The image store of a new containerd, with blobs."""
    async with running(parts.CONTAINERDS[-1], directory) as channel, store(channel).leased() as made:
        for blob in blobs:

            async def whole(blob: bytes = blob) -> AsyncIterator[bytes]:
                yield blob

            await made.write_content(f"sha256:{hashlib.sha256(blob).hexdigest()}", len(blob), whole, {})
        yield made


def _private_configuration(version: int, directory: Path) -> dict[str, Any]:
    """The node's configuration of containerd with a snapshotter of containerd's own: nothing lies at the system's paths."""
    settings = config.ContainerdSettings(
        version=version,
        root=f"{directory}/root",
        state=f"{directory}/state",
        address=f"{directory}/c.sock",
        opt_dir=f"{directory}/opt",
        snapshotter=SNAPSHOTTER,
        proxies=(),
        sandbox_image="localhost/pause:1",
        cni_bin_dir=f"{directory}/cni",
        cni_conf_dir=f"{directory}/net.d",
        runc="/usr/sbin/runc",
        runc_root=f"{directory}/state/runc",
        nri_socket=f"{directory}/nri.sock",
        restrict_oom_score_adj=True,
        architecture="amd64",
    )
    return config.tables(settings)


@contextlib.asynccontextmanager
async def with_cri(version: str, directory: Path, image: str) -> AsyncIterator[channels.Channel]:
    """A containerd of a version that serves the CRI, with an image; the snapshotter is ``SNAPSHOTTER``."""
    program = await config.ask(str(parts.containerd(version)))
    file = directory / "config.toml"
    file.write_text(tomli_w.dumps(_private_configuration(program.config_version, directory)))
    socket = f"{directory}/c.sock"
    argv = [program.path, f"--config={file}", f"--address={socket}", f"--root={directory}/root"]
    argv.append(f"--state={directory}/state")
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    with (directory / "containerd.log").open("wb") as log:
        async with (
            process.start(argv, env=environment, stdout=log.fileno(), stderr=process.STDOUT, grace=10),
            channels.connect(socket) as channel,
        ):
            await _until_ready(channel, directory / "containerd.log")
            archive = directory / "image.tar"
            layer = image_archives.tar({"hello": b"hello"})
            archive.write_bytes(image_archives.tar(image_archives.oci([layer], name=image)))
            ctr = os.path.join(os.path.dirname(program.path), "ctr")
            importing = [
                ctr,
                "-a",
                socket,
                "-n",
                "k8s.io",
                "images",
                "import",
                "--snapshotter",
                SNAPSHOTTER,
                str(archive),
            ]
            (await process.run(importing, timeout=30)).check()
            yield channel


async def _until_ready(channel: channels.Channel, log: Path) -> None:
    version = containerd_version_grpc.VersionStub(channel)
    images = cri_grpc.ImageServiceStub(channel)

    async def ask() -> None:
        with channels.translated("containerd"):
            await version.Version(empty_pb2.Empty())
            await images.ListImages(pb.ListImagesRequest())

    try:
        async with asyncio.timeout(30):
            await channels.wait_until_answered(ask)
    except TimeoutError:
        pytest.fail(log.read_text())
