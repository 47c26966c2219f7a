"""Nix archives (Nix manual, "Nix Archive (NAR) format"): of a package with one program, which is all that we add to a store."""

from collections.abc import Iterator
from typing import BinaryIO

from nixlet import errors
from nixlet.host import files

#: How much is read at a time (bytes).
_CHUNK = 1 << 18

_MAGIC = "nix-archive-1"
_DIRECTORY, _FILE = ("(", "type", "directory"), ("(", "type", "regular", "executable", "", "contents")
_END = (")",)


def of_program(name: str, file: BinaryIO, size: int) -> Iterator[bytes]:
    """The archive of a directory with the executable file ``bin/NAME`` in it, piece by piece.

    Args:
        name: The program's name.
        file: The program, open at its beginning.
        size: How large it is (bytes).

    Raises:
        FailedPreconditionError: It can't be read, or has another size: somebody writes it just now.
    """
    above = (*_DIRECTORY, "entry", "(", "name", "bin", "node", *_DIRECTORY, "entry", "(", "name", name, "node")
    yield _texts(_MAGIC, *above, *_FILE) + size.to_bytes(8, "little")
    left = size
    while chunk := _read(file, min(_CHUNK, left)):
        left -= len(chunk)
        yield chunk
    if left or _read(file, 1):
        raise errors.FailedPreconditionError(f"{file.name} changes while it is read", hint="try again when it is whole")
    yield bytes(-size % 8) + _texts(*_END * 5)


def _texts(*values: str) -> bytes:
    encoded = [value.encode() for value in values]
    return b"".join(len(each).to_bytes(8, "little") + each + bytes(-len(each) % 8) for each in encoded)


def _read(file: BinaryIO, size: int) -> bytes:
    with files.refusing(f"{file.name} can't be read"):
        return file.read(size)
