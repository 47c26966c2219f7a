"""Expanding a file that is compressed as a whole: by gzip, bzip2, lz4 or zstd, which is known by its first bytes."""

import bz2
import contextlib
import gzip
import io
import os
import threading
import zlib
from collections.abc import Iterator
from typing import IO

from nixlet import errors
from nixlet.host import files
from nixlet.images import scratch

#: What grows beyond this is refused, in bytes.
MAX_EXPANDED_BYTES = 32 * 1024**3

#: How far zstd may refer back, in bytes, which has to be held in memory; k3s has the same limit.
_MAX_WINDOW = 32 * 1024**2

GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BZIP2_MAGIC, _LZ4_MAGIC, _XZ_MAGIC = b"BZh", b"\x04\x22\x4d\x18", b"\xfd7zXZ\x00"

_CHUNK = 1024 * 1024


def is_compressed(fd: int) -> bool:
    """Whether a file is compressed, be it in a way that ``expanded`` doesn't know."""
    with files.refusing("the image archive can't be read"):
        return os.pread(fd, 6, 0).startswith((GZIP_MAGIC, ZSTD_MAGIC, _BZIP2_MAGIC, _LZ4_MAGIC, _XZ_MAGIC))


@contextlib.contextmanager
def expanded(fd: int, shown: str, directory: str | None = None, stop: threading.Event | None = None) -> Iterator[int]:
    """What a compressed file expands to, as an unnamed temporary file, open for the time of the context.

    Args:
        fd: The compressed file; it is read from its beginning.
        shown: What errors call the file.
        directory: Where the temporary file goes; the system's directory for such by default.
        stop: Ends the work early when it is set, since nobody wants it any more.

    Raises:
        InvalidArgumentError: It is damaged, ends too early, expands to too much, or is compressed in another way.
        CallCancelledError: ``stop`` was set.
        NixletError: The file system refuses what it expands to, as in ``scratch.opened``.
    """
    with scratch.opened(f"{shown} can't be expanded in", directory) as target:
        written = 0
        for chunk in _chunks(fd, shown):
            if stop is not None and stop.is_set():
                raise errors.CallCancelledError(f"{shown} is not wanted any more")
            written += len(chunk)
            if written > MAX_EXPANDED_BYTES:
                raise errors.InvalidArgumentError(f"{shown} expands to more than {MAX_EXPANDED_BYTES} bytes")
            target.write(chunk)
        yield target.fileno()


def _chunks(fd: int, shown: str) -> Iterator[bytes]:
    import zstandard  # noqa: PLC0415 (few archives are compressed)

    with os.fdopen(os.dup(fd), "rb") as source:
        source.seek(0)
        try:
            with _reader(source, shown) as stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
        except EOFError as error:
            raise errors.InvalidArgumentError(
                f"the image archive {shown} ends too early", hint="copy or build it again"
            ) from error
        except (OSError, RuntimeError, zlib.error, zstandard.ZstdError) as error:
            if isinstance(error, OSError) and error.errno:
                raise files.refused(f"the image archive {shown} can't be read", error) from error
            # bzip2's complaints are OSErrors without a number, lz4's are RuntimeErrors.
            raise errors.InvalidArgumentError(f"{shown} is not an image archive: {error}") from error


def _reader(source: io.BufferedReader, shown: str) -> IO[bytes] | gzip.GzipFile:
    import lz4.frame  # noqa: PLC0415 (few archives are compressed)
    import zstandard  # noqa: PLC0415 (few archives are compressed)

    magic = source.peek(6)
    reader: IO[bytes] | gzip.GzipFile
    if magic.startswith(GZIP_MAGIC):
        reader = gzip.GzipFile(fileobj=source)
    elif magic.startswith(_BZIP2_MAGIC):
        reader = bz2.BZ2File(source)
    elif magic.startswith(_LZ4_MAGIC):
        reader = lz4.frame.LZ4FrameFile(source)
    elif magic.startswith(ZSTD_MAGIC):
        reader = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).stream_reader(source, read_across_frames=True)
    else:
        raise errors.InvalidArgumentError(
            f"{shown} is compressed with xz, which image archives can't be",
            hint="expand it with xz -d, or compress it with zstd",
        )
    return reader
