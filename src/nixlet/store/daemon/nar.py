"""Nix archives in a stream: finding where one ends (Nix manual, "Nix Archive (NAR) format"), without keeping its content."""

from collections.abc import Generator

from nixlet.store.daemon import wire

#: Names have at most 255 bytes, link targets 4096 (path_resolution(7)).
_MAX_TOKEN = 4096

#: What the grammar asks for: so many bytes to look at, or minus so many to skip.
_Wants = Generator[int, bytes, None]


class Scanner:
    """Follows one archive; ``finished`` once its last byte was fed."""

    def __init__(self) -> None:
        self.finished = False
        self._grammar = _archive()
        self._wanted = next(self._grammar)
        self._kept = bytearray()

    def feed(self, data: bytes) -> int:
        """Take up the next bytes; how many of them belong to the archive.

        Raises:
            ProtocolError: This is no archive.
        """
        position = 0
        while not self.finished:
            if self._wanted < 0:
                step = min(-self._wanted, len(data) - position)
                position += step
                self._wanted += step
                if self._wanted:
                    break
                self._go_on(b"")
            else:
                piece = data[position : position + self._wanted - len(self._kept)]
                position += len(piece)
                self._kept += piece
                if len(self._kept) < self._wanted:
                    break
                token = bytes(self._kept)
                self._kept.clear()
                self._go_on(token)
        return position

    def _go_on(self, token: bytes) -> None:
        try:
            self._wanted = self._grammar.send(token)
        except StopIteration:
            self.finished = True


def _token() -> Generator[int, bytes, bytes]:
    length = int.from_bytes((yield 8), "little")
    if length > _MAX_TOKEN:
        raise wire.ProtocolError(f"the archive has a name of {length} bytes, which can't be")
    return (yield length + -length % 8)[:length]


def _expect(*tokens: bytes) -> _Wants:
    for expected in tokens:
        found = yield from _token()
        if found != expected:
            raise wire.ProtocolError(f"the archive has {found[:40]!r} in the place of {expected!r}")


def _file() -> _Wants:
    word = yield from _token()
    if word == b"executable":
        yield from _expect(b"", b"contents")
    elif word != b"contents":
        raise wire.ProtocolError(f"the archive has a file without contents: {word[:40]!r}")
    length = int.from_bytes((yield 8), "little")
    if length:
        yield -(length + -length % 8)
    yield from _expect(b")")


def _archive() -> _Wants:
    """The grammar; directories by a count of how many are open, so that depth costs nothing."""
    yield from _expect(b"nix-archive-1")
    depth = 0
    while True:
        yield from _expect(b"(", b"type")
        kind = yield from _token()
        if kind == b"directory":
            depth += 1
        elif kind == b"regular":
            yield from _file()
        elif kind == b"symlink":
            yield from _expect(b"target")
            yield from _token()
            yield from _expect(b")")
        else:
            raise wire.ProtocolError(f"the archive has a node of unknown type {kind[:40]!r}")
        closed = kind != b"directory"
        while True:
            if closed:
                if not depth:
                    return
                yield from _expect(b")")  # the entry that the node was in
            word = yield from _token()
            if word == b"entry":
                yield from _expect(b"(", b"name")
                yield from _token()
                yield from _expect(b"node")
                break
            if word != b")":
                raise wire.ProtocolError(f"the archive has {word[:40]!r} in a directory")
            depth -= 1
            closed = True
