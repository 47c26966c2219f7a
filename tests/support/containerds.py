"""Real containerds without CRI, for what only their image store is needed for; snapshotter: native."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from nixlet.containerd import imagestore
from nixlet.host import process
from nixlet.rpc import channel as channels
from support import parts

#: The snapshotter that every machine has.
SNAPSHOTTER = "native"

_CRI = ("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime")


@contextlib.asynccontextmanager
async def running(version: str, directory: Path) -> AsyncIterator[channels.Channel]:
    """A containerd of a version, with all that is its own below a directory."""
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
