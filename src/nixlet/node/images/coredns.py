"""The image of the cluster's DNS server: the program that the machine has, as a Nix image.

A program in the Nix store is in the image with its closure. One from elsewhere must be a single static file, and is added to the store.
Either way the image holds the program's path alone, under a name of this machine's that changes with the program: what is rolled out
is what is there.
"""

import asyncio
import contextlib
import hashlib
import io
import logging
import os
import stat
import tempfile
from collections.abc import Iterator

from nixlet import errors
from nixlet.containerd import cri, imagestore
from nixlet.host import files
from nixlet.images import archive, builder, loader, model, platforms, pulls, reference
from nixlet.node.images import pause
from nixlet.store import paths
from nixlet.store.daemon import client as nix
from nixlet.telemetry import progress

#: The program's name.
PROGRAM = "coredns"

#: The image's name, before its tag.
_REPOSITORY = "localhost/nixlet/coredns"

_BIN = "bin"

#: A static program says so in its headers, at its beginning (bytes).
_HEADERS = 1 << 16

#: How many characters of a hash tell one state of a program from another.
_TAG = 16

_log = logging.getLogger("nixlet.coredns")


class Maker:
    """Makes the image, and loads it into the node's containerd.

    Args:
        store: The store of the node's snapshotter.
        loads: Loads images into containerd.
        containerd: The containerd.
        shown: Its CRI, which learns of images late.
        directory: Where files go for a moment.
    """

    def __init__(
        self,
        store: nix.DaemonStore,
        loads: loader.Loader,
        containerd: imagestore.ImageStore,
        shown: cri.ImageClient,
        directory: str,
    ) -> None:
        self._store = store
        self._loader = loads
        self._containerd = containerd
        self._shown = shown
        self._directory = directory

    async def image_of(self, program: str) -> str:
        """Have the image of a program in containerd, pinned; its name.

        Args:
            program: The program's absolute path; links are followed.

        Raises:
            UnsupportedError: It can't be alone in an image.
            NixletError: It can't be added to the store, or the image not be loaded.
        """
        real = os.path.realpath(program)
        with files.refusing(f"{program} can't be used for the cluster's DNS"):
            status = os.stat(real)
        inside = _inside(real, self._store)
        origin = real if inside is not None else _origin(real, status)
        tag = hashlib.sha256(origin.encode()).hexdigest()[:_TAG]
        name = reference.canonical(reference.parse(f"{_REPOSITORY}:{tag}"))
        loaded = await self._loader.load_again(name, origin, progress.ignore)
        if loaded is None:
            loaded = await self._load(real, inside, name, origin)
            _log.info("made the image %s of %s", name, real)
        await pulls.wait_for_cri(self._shown, loaded.image_id, [name])
        await self._let_go(name)
        return name

    async def _load(
        self, program: str, inside: tuple[paths.StorePath, str] | None, name: str, origin: str
    ) -> loader.Loaded:
        async with contextlib.AsyncExitStack() as stack:
            # Until the image is loaded the session holds what is in it.
            session = await stack.enter_async_context(self._store.session())
            if inside is None:
                with _opened(program) as file:
                    root = await session.add_program(PROGRAM, file, os.fstat(file.fileno()).st_size)
                entry = f"{root}/{_BIN}/{PROGRAM}"
                closure = [root]
            else:
                root, entry = inside
                await session.hold([root])
                closure = sorted(await session.closure([root]))
            config = model.ContainerConfig(entrypoint=[entry])
            request = builder.BuildRequest(config, tuple(closure), name=reference.parse(name))
            path = os.path.join(stack.enter_context(_scratch(self._directory)), f"{PROGRAM}.tar")
            await asyncio.to_thread(builder.build_image, request, path)
            source = stack.enter_context(archive.open_archive(path))
            image = source.image(platforms.host_platform())
            labels = {**imagestore.PINNED, **loader.came_from(origin, image.descriptor.digest)}
            return await self._loader.load(source, image, [name], labels=labels)

    async def _let_go(self, current: str) -> None:
        """Unpin the images of earlier programs: kubelets collect them when nothing runs of them any more."""
        for image in await self._containerd.images(f'name~="^{_REPOSITORY}:"'):
            if image.name != current:
                # (a kubelet may collect one in this moment)
                with contextlib.suppress(errors.NotFoundError):
                    await self._containerd.label_image(image, dict.fromkeys(imagestore.PINNED, ""))


def _origin(program: str, status: os.stat_result) -> str:
    """What tells one state of a program from another; in the Nix store the path alone does.

    Not the device: some file systems (btrfs, ZFS, overlayfs, NFS) have another number after each boot.
    """
    return f"{program} {status.st_ino} {status.st_size} {status.st_mtime_ns}"


def _inside(program: str, store: nix.DaemonStore) -> tuple[paths.StorePath, str] | None:
    """The store path that a program is in, and the program's path as containers see it; None: it is in no store."""
    directory = os.path.realpath(store.real_dir)
    if not program.startswith(f"{directory}/"):
        return None
    below = program.removeprefix(f"{directory}/")
    return paths.from_name(below.split("/")[0], store.store_dir), f"{store.store_dir}/{below}"


@contextlib.contextmanager
def _opened(program: str) -> Iterator[io.BufferedReader]:
    """A static program, open for reading."""
    with files.refusing(f"{program} can't be read"):
        file = open(program, "rb")  # noqa: SIM115 (closed below)
    with file:
        with files.refusing(f"{program} can't be read"):
            head = file.read(_HEADERS)
            file.seek(0)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or not pause.is_static(head):
            raise errors.UnsupportedError(
                f"{program} can't serve the cluster's names: it is no statically linked program, and its image has nothing else",
                hint="name an image of CoreDNS (--coredns-image), or do without: --disable coredns",
            )
        yield file


def _scratch(directory: str) -> "tempfile.TemporaryDirectory[str]":
    """A directory of our own for a moment."""
    with files.refusing(f"the image of {PROGRAM} can't be made in {directory}"):
        return tempfile.TemporaryDirectory(prefix=f".{PROGRAM}-", dir=directory)
