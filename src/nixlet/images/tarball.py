"""Tar files that nobody vouches for: what they hold and where it lies, without extracting anything.

Only headers are read; a member's content is a range of the file. Formats: ustar, pax and GNU's long names (POSIX.1-2024, "pax
Interchange Format"; GNU tar manual, "Basic Tar Format"). Sparse files are refused, no image tool writes them.
"""

import dataclasses
import hashlib
import io
import os
import posixpath
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nixlet import errors
from nixlet.host import files

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 512

#: More than any image archive has: 127 layers of Docker's older form make 400.
MAX_MEMBERS = 10_000

#: Long names and pax records of one member, in bytes.
_MAX_EXTENSION_BYTES = 64 * 1024
_MAX_LINKS = 8
_CHUNK = 1024 * 1024

_REGULAR = frozenset(b"0\x007")
_HARD_LINK, _SYMLINK = b"12"
#: Links, devices, directories and FIFOs have no content, whatever their size field says.
_HEADER_ONLY = frozenset(b"123456")
_PAX, _PAX_GLOBAL, _GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE = b"xgLKS"


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """A regular file or a link of a tar file.

    Attributes:
        name: Its path inside, normalised.
        offset: Where its content begins, in bytes.
        size: The length of its content, in bytes.
        target: For a link, the name inside the archive that it leads to, else None.
    """

    name: str
    offset: int
    size: int
    target: str | None = None


class Tarball:
    """The index of a tar file, made in one pass over its headers.

    Members with names that are absolute or lead upwards, directories and devices are left out: nothing can refer to them.
    """

    def __init__(self, fd: int, label: str, stop: threading.Event | None = None) -> None:
        """Read the index.

        Args:
            fd: The file, open for reading; stays the caller's.
            label: What errors call it.
            stop: Makes every reading raise CallCancelledError when it is set.

        Raises:
            InvalidArgumentError: It is no tar file, is cut short, has too many members or two of one name that differ.
        """
        self._fd = fd
        self.label = label
        self._stop = stop
        self._size = os.fstat(fd).st_size
        self._members: dict[str, Member] = {}
        self._digests: dict[Member, str] = {}
        for count, member in enumerate(self._walk(), start=1):
            if count > MAX_MEMBERS:
                raise self.malformed(f"it has more than {MAX_MEMBERS} members")
            if member is not None:
                self._add(member)

    def malformed(self, why: str) -> errors.InvalidArgumentError:
        """The error that says what is wrong with the archive."""
        return errors.InvalidArgumentError(
            f"{self.label} is not an image archive: {why}",
            hint="make it with nixlet image build, docker save or skopeo copy",
        )

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def find(self, name: str) -> Member:
        """The regular file of that name, links followed inside the archive.

        Raises:
            InvalidArgumentError: There is none.
        """
        wanted = name
        for _ in range(_MAX_LINKS):
            member = self._members.get(_normal(wanted) or "")
            if member is None:
                break
            if member.target is None:
                return member
            wanted = member.target
        raise self.malformed(f"it has no file {name[:200]!r}")

    def read(self, member: Member, offset: int, length: int) -> bytes:
        """Some bytes of a member's content; fewer only at its end.

        Raises:
            NixletError: The file system refuses, as in ``files.refused``.
        """
        return self._read(member.offset + offset, max(0, min(length, member.size - offset)))

    def chunks(self, member: Member) -> Iterator[bytes]:
        """A member's content, piece by piece."""
        for offset in range(0, member.size, _CHUNK):
            yield self.read(member, offset, _CHUNK)

    def digest(self, member: Member) -> str:
        """The digest of a member's content, which is read once for however many images it is."""
        if member not in self._digests:
            seen = hashlib.sha256()
            for chunk in self.chunks(member):
                seen.update(chunk)
            self._digests[member] = f"sha256:{seen.hexdigest()}"
        return self._digests[member]

    def _read(self, offset: int, length: int) -> bytes:
        if self._stop is not None and self._stop.is_set():
            raise errors.CallCancelledError(f"{self.label} is not wanted any more")
        pieces = []
        while length > 0:
            # The archive's own trouble: whoever writes elsewhere what is read here must not take it for theirs.
            with files.refusing(f"the image archive {self.label} can't be read"):
                piece = os.pread(self._fd, length, offset)
            if not piece:
                raise self._cut_short()
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _cut_short(self) -> errors.InvalidArgumentError:
        return errors.InvalidArgumentError(
            f"the image archive {self.label} ends too early", hint="copy or build it again"
        )

    def _walk(self) -> Iterator[Member | None]:
        """Every member in order, None for those that are left out."""
        offset, pax, long_name, long_link = 0, dict[str, str](), None, None
        while True:
            if offset + BLOCK > self._size:
                raise self._cut_short() if offset else self.malformed("it is no tar file")
            header = self._read(offset, BLOCK)
            if not any(header):
                if offset == 0:
                    raise self.malformed("it is empty")
                return
            if not _checksum_fits(header):
                raise self.malformed("a header's checksum is wrong" if offset else "it is no tar file")
            kind = header[156]
            size = 0 if kind in _HEADER_ONLY else self._size_of(header[124:136], pax)
            start, offset = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
            if kind in {_PAX, _PAX_GLOBAL, _GNU_LONG_NAME, _GNU_LONG_LINK}:
                content = self._extension(start, size)
                if kind == _PAX:
                    pax = self._pax_records(content)
                elif kind == _GNU_LONG_NAME:
                    long_name = _text(content)
                elif kind == _GNU_LONG_LINK:
                    long_link = _text(content)
                yield None
                continue
            if kind == _GNU_SPARSE or any(key.startswith("GNU.sparse") for key in pax):
                raise self.malformed("it has a sparse member")
            if start + size > self._size:
                raise self._cut_short()
            name = _normal(pax.get("path") or long_name or _header_name(header))
            link = pax.get("linkpath") or long_link or _text(header[157:257])
            pax, long_name, long_link = {}, None, None
            yield None if name is None else _member(name, kind, start, size, link)

    def _extension(self, start: int, size: int) -> bytes:
        if size > _MAX_EXTENSION_BYTES:
            raise self.malformed("a member's extended header is too large")
        if start + size > self._size:
            raise self._cut_short()
        return self._read(start, size)

    def _size_of(self, field: bytes, pax: dict[str, str]) -> int:
        """A size: a pax record's decimal digits, octal ones, or GNU's binary form for sizes from 8 GiB."""
        try:
            if "size" in pax:
                return _digits(pax["size"], 10)
            if field[:1] == b"\x80":
                return int.from_bytes(field[1:], "big")
            return _digits(field.decode("ascii").strip(" \x00") or "0", 8)
        except ValueError as error:
            raise self.malformed("a member's size is no number") from error

    def _pax_records(self, content: bytes) -> dict[str, str]:
        """Records "<length> <key>=<value>" and a line feed, where the length counts the whole record."""
        records: dict[str, str] = {}
        while content.strip(b"\x00"):
            length, space, _ = content.partition(b" ")
            if (
                not space
                or not length.isdigit()
                or len(length) > 6
                or not len(length) + 3 < int(length) <= len(content)
            ):
                raise self.malformed("a member's extended header is malformed")
            key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
            records[_text(key)] = _text(value)
            content = content[int(length) :]
        return records

    def _add(self, member: Member) -> None:
        known = self._members.setdefault(member.name, member)
        if known is not member and not self._same(known, member):
            raise self.malformed(f"it has two files {member.name[:200]!r} that differ")

    def _same(self, one: Member, other: Member) -> bool:
        if (one.size, one.target) != (other.size, other.target):
            return False
        return all(a == b for a, b in zip(self.chunks(one), self.chunks(other), strict=True))


class DigestReader(io.RawIOBase):
    """A member's content, checked against its digest when the end is reached."""

    def __init__(self, files: Tarball, member: Member, digest: str) -> None:
        super().__init__()
        self._files = files
        self._member = member
        self._expected = digest
        self._seen = hashlib.sha256()
        self._offset = 0

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Read what comes next.

        Raises:
            InvalidArgumentError: It is the end, and the digest is wrong.
        """
        view = memoryview(buffer).cast("B")
        data = self._files.read(self._member, self._offset, len(view))
        self._seen.update(data)
        self._offset += len(data)
        if self._offset == self._member.size and f"sha256:{self._seen.hexdigest()}" != self._expected:
            raise self._files.malformed(f"the content of {self._expected} has another digest")
        view[: len(data)] = data
        return len(data)


def _member(name: str, kind: int, start: int, size: int, link: str) -> Member | None:
    if kind in _REGULAR:
        return Member(name, start, size)
    if kind == _HARD_LINK:
        target = _normal(link)
    elif kind == _SYMLINK:
        target = _normal(posixpath.join(posixpath.dirname(name), link))
    else:
        return None
    # A link that leads outside is kept with a target that no member can have.
    return Member(name, start, 0, target or "..")


def _normal(name: str) -> str | None:
    """A name as it is looked up, or None if it leads outside."""
    normal = posixpath.normpath(name)
    return None if not name or normal.startswith(("/", "../")) or normal in {".", ".."} or "\x00" in normal else normal


def _header_name(header: bytes) -> str:
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\x00" else ""
    return f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])


def _text(field: bytes) -> str:
    return field.partition(b"\x00")[0].decode(errors="surrogateescape")


def _digits(text: str, base: int) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 20:
        raise ValueError(text)
    return int(text, base)


def _checksum_fits(header: bytes) -> bool:
    try:
        stated = int(header[148:156].strip(b" \x00") or b"0", 8)
    except ValueError:
        return False
    return stated == sum(header) - sum(header[148:156]) + 8 * 0x20
