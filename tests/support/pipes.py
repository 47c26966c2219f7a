"""Pipes whose ends can be closed once each, and no descriptor of anybody else's after that."""

import contextlib
import fcntl
import io
import os
from collections.abc import Iterator


class Pipe:
    """A pipe as a shell makes them."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        self.read_end, self.write_end = io.FileIO(reader, "r"), io.FileIO(writer, "w")

    @property
    def reader(self) -> int:
        return self.read_end.fileno()

    @property
    def writer(self) -> int:
        return self.write_end.fileno()

    def is_blocking(self) -> bool:
        """Whether who writes to it waits for room."""
        return not fcntl.fcntl(self.writer, fcntl.F_GETFL) & os.O_NONBLOCK


@contextlib.contextmanager
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    try:
        yield made
    finally:
        made.read_end.close()
        made.write_end.close()
