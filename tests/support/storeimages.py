"""Nix images of any size in the host's own store, made quickly: paths are added over the daemon's protocol, not built."""

import asyncio
import os
import struct
from pathlib import Path

from nixlet.images import builder, model, reference
from nixlet.store import paths
from nixlet.store.daemon import client

BUSYBOX = Path("/bin/busybox")


def _text(data: str | bytes) -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return struct.pack("<Q", len(raw)) + raw + bytes(-len(raw) % 8)


def nar_file(content: bytes, *, executable: bool = False) -> bytes:
    """The archive of a plain file (Nix manual, "Nix Archive (NAR) format"), without the magic."""
    mark = [_text("executable"), _text("")] if executable else []
    return b"".join([_text("("), _text("type"), _text("regular"), *mark, _text("contents"), _text(content), _text(")")])


def nar_link(target: str) -> bytes:
    return b"".join([_text("("), _text("type"), _text("symlink"), _text("target"), _text(target), _text(")")])


def nar_directory(entries: dict[str, bytes]) -> bytes:
    parts = [_text("("), _text("type"), _text("directory")]
    for name, node in sorted(entries.items()):
        parts += [_text("entry"), _text("("), _text("name"), _text(name), _text("node"), node, _text(")")]
    return b"".join([*parts, _text(")")])


def nar(node: bytes) -> bytes:
    return _text("nix-archive-1") + node


class StoreImage:
    """An image whose closure has a known number of paths.

    Attributes:
        archive: The image's archive, a plain file outside the store.
        paths: The closure.
        file: Among them, one that is a plain file ("" for a closure of one path).
        link: Among them, one that is a symlink to that file.
    """

    def __init__(self, archive: Path, closure: list[paths.StorePath], file: str, link: str) -> None:
        self.archive = archive
        self.paths = closure
        self.file = file
        self.link = link

    @property
    def reference(self) -> str:
        return f"nix:0{self.archive}"


async def _make(directory: Path, count: int, closure_form: bool) -> StoreImage:
    settings = client.DaemonSettings.from_environment(os.environ)
    async with client.DaemonStore(settings).session() as session:
        applets = {"busybox": nar_file(BUSYBOX.read_bytes(), executable=True)}
        applets |= {
            name: nar_link("busybox") for name in ("sh", "sleep", "ls", "cat", "true", "echo", "find", "readlink")
        }
        root = await session.add_nar("busybox", nar(nar_directory({"bin": nar_directory(applets)})))
        closure, file, link = [root], "", ""
        if count > 2:
            file = await session.add_nar("plain-file.txt", nar(nar_file(b"a plain file\n")))
            link = await session.add_nar("link", nar(nar_link(file)), [file])
            closure += [file, link]
        for number in range(count - len(closure)):
            content = nar_directory({"share": nar_directory({"number": nar_file(f"{number}\n".encode())})})
            closure.append(await session.add_nar(f"package-{number}", nar(content)))
        listing = "".join(f"{path}\n" for path in closure).encode()
        info = None
        if closure_form:
            tree = nar_directory({"store-paths": nar_file(listing), "registration": nar_file(b"")})
            info = await session.add_nar("closure-info", nar(tree), closure)
    archive = directory / f"nix-image-{count}-{'closure' if closure_form else 'paths'}.tar"
    config = model.ContainerConfig(entrypoint=None, cmd=["/bin/sh"], env=["PATH=/bin"])
    request = builder.BuildRequest(
        config,
        tuple(closure),
        info,
        (root,),
        None,
        reference.parse(f"nix:0{archive}"),
        model.Platform("amd64", "linux"),
    )
    builder.build_image(request, str(archive))
    return StoreImage(archive, closure, file, link)


def make(directory: Path, count: int, *, closure_form: bool = True) -> StoreImage:
    """An image of busybox and ``count - 1`` other store paths, among them a plain file and a symlink from 3 on."""
    return asyncio.run(_make(directory, count, closure_form))
