"""Nix images of any size in the host's own store, made quickly: paths are added over the daemon's protocol, not built."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nixlet.images import builder, model, reference
from nixlet.store import paths
from support import nixstore

BUSYBOX = Path("/bin/busybox")


class StoreImage:
    """An image whose closure has a known number of paths.

    Attributes:
        archive: The image's archive, a plain file outside the store.
        paths: The closure.
        file: Among them, one that is a plain file ("" for a closure of one path).
        link: Among them, one that is a symlink to that file.
        info: The closureInfo, or "".
    """

    def __init__(self, archive: Path, closure: list[paths.StorePath], file: str, link: str, info: str) -> None:
        self.archive = archive
        self.paths = closure
        self.file = file
        self.link = link
        self.info = info

    @property
    def reference(self) -> str:
        return f"nix:0{self.archive}"


class Program(NamedTuple):
    """A program of this machine in the store, with all libraries that it loads.

    Attributes:
        package: Its store path.
        argv: How a container starts it.
    """

    package: paths.StorePath
    argv: list[str]


def program(place: str) -> Program:
    """Have a program of this machine in the store.

    Its C library looks names up as most programs' does. What busybox has of network programs can't do that: it is static, and ends with a
    fault.
    """
    needed = libraries(place)
    inside = {path.name: nixstore.nar_file(path.read_bytes(), executable=True) for path in (Path(place), *needed)}
    adding = nixstore.Import()
    name = Path(place).name
    package = adding.add(name, nixstore.nar_directory(inside))
    adding.run(os.environ)
    return Program(package, [f"{package}/{loader(needed)}", "--library-path", package, f"{package}/{name}"])


def libraries(place: str) -> list[Path]:
    """What a program of this machine loads."""
    listed = subprocess.run(["ldd", place], capture_output=True, text=True, check=True).stdout
    return [Path(word) for line in listed.splitlines() for word in line.split() if word.startswith("/")]


def loader(needed: Sequence[Path]) -> str:
    """Among what a program loads, the name of what loads it."""
    (name,) = [path.name for path in needed if path.name.startswith("ld-")]
    return name


def make_bash(directory: Path) -> tuple[StoreImage, list[str]]:
    """An image with busybox and the machine's bash; and bash's command line."""
    bash = program("/bin/bash")
    return make(directory, 1, salt="-bash", also=[bash.package]), bash.argv


def make(
    directory: Path, count: int, *, closure_form: bool = True, salt: str = "", also: Sequence[paths.StorePath] = ()
) -> StoreImage:
    """An image of busybox and ``count - 1`` other store paths, among them a plain file and a symlink from 3 on.

    Images of one salt share paths, and no path with those of another one: a test that deletes paths has one of its own.
    """
    adding = nixstore.Import()
    applets = {"busybox": nixstore.nar_file(BUSYBOX.read_bytes(), executable=True)}
    applets |= {
        name: nixstore.nar_link("busybox") for name in ("sh", "sleep", "ls", "cat", "true", "echo", "find", "readlink")
    }
    salted = {"salt": nixstore.nar_file(salt.encode())} if salt else {}
    root = adding.add("busybox", nixstore.nar_directory({"bin": nixstore.nar_directory(applets), **salted}))
    closure, file, link = [root], "", ""
    if count > 2:
        file = adding.add("plain-file.txt", nixstore.nar_file(f"a plain file\n{salt}".encode()))
        link = adding.add("link", nixstore.nar_link(file), [file])
        closure += [file, link]
    for number in range(count - len(closure)):
        inside = nixstore.nar_directory({"number": nixstore.nar_file(f"{number}\n".encode()), **salted})
        closure.append(adding.add(f"package-{number}", nixstore.nar_directory({"share": inside})))
    closure += also
    listing = "".join(f"{path}\n" for path in closure).encode()
    info = None
    if closure_form:
        tree = {"store-paths": nixstore.nar_file(listing), "registration": nixstore.nar_file(b"")}
        info = adding.add("closure-info", nixstore.nar_directory(tree), closure)
    adding.run(os.environ)
    archive = directory / f"nix-image-{count}-{'closure' if closure_form else 'paths'}{salt}.tar"
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
    return StoreImage(archive, closure, file, link, info or "")
