"""Small disks that a test fills."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nixlet.host import mounts


@contextlib.contextmanager
def disk(kind: str, directory: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own: "ext4" on a loop device, or "tmpfs"."""
    directory.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,nr_inodes=1000", "tmpfs", str(directory)]
    if kind == "ext4":
        image = directory.parent / f"{directory.name}.img"
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
        argv = ["mount", "-o", "loop", str(image), str(directory)]
    subprocess.run(argv, check=True)
    try:
        yield directory
    finally:
        for entry in reversed(mounts.below(str(directory))):
            mounts.unmount(entry.path)


def fill(directory: Path) -> None:
    """Leave no room on the disk, not even for an empty directory."""
    ballast = directory / "ballast"
    ballast.mkdir()
    with contextlib.suppress(OSError), (ballast / "blocks").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with contextlib.suppress(OSError):
        for number in range(100_000):
            (ballast / str(number)).mkdir()


def leave_a_little(directory: Path) -> None:
    """Take away of what ``fill`` put there: room for one more file or directory of 128 KiB."""
    blocks = directory / "ballast" / "blocks"
    os.truncate(blocks, blocks.stat().st_size - (128 << 10))
    (directory / "ballast" / "0").rmdir()


def make_room(directory: Path) -> None:
    """Take away what ``fill`` put there."""
    subprocess.run(["rm", "-r", str(directory / "ballast")], check=True)
