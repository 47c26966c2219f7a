"""Our own standard streams: always there, and nobody's trouble with reading them keeps a verb from its work."""

import errno
import io
import os
import sys

from nixlet import errors

#: The exit statuses of a program that SIGPIPE ends, and SIGHUP (the module that has their names takes time to import).
READER_GONE = 128 + 13
TERMINAL_GONE = 128 + 1


class Exit(Exception):
    """The verb ends here, with all said that there is to say.

    Attributes:
        status: The exit status.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Output(io.RawIOBase):
    """A standard stream that takes everything: what can't be written is dropped, and why is kept for the end.

    A verb that removes something and says so must not stop half-way because ``head`` has seen enough.

    Attributes:
        failure: The first error.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self.failure: OSError | None = None

    def writable(self) -> bool:
        """It is for writing."""
        return True

    def fileno(self) -> int:
        """The file descriptor."""
        return self._fd

    def isatty(self) -> bool:
        """Whether a person sees it."""
        return os.isatty(self._fd)

    def write(self, data: "bytes | memoryview[int]") -> int:  # type: ignore[override]  # any buffer, says typeshed
        """Write, or drop."""
        if self.failure is None:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:
                # Somebody else made the file non-blocking; it is shared with them.
                os.set_blocking(self._fd, True)
                return 0
            except OSError as error:
                self.failure = error
        return len(data)


def prepare() -> None:
    """Have three standard streams, of which the two for output take everything.

    Without a descriptor of its own, the first socket that is opened would get its number, and what is printed.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
        if fd:
            old = getattr(sys, name)
            raw = Output(fd)
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(raw),  # type: ignore[type-var]  # what io asks of a raw stream, it has
                encoding=old.encoding if old is not None else "utf-8",
                errors="backslashreplace",
                # Whoever reads on waits for whole lines.
                line_buffering=True,
            )
            setattr(sys, name, wrapped)
        elif sys.stdin is None:
            sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)


def write(stream: str, data: bytes) -> None:
    """Hand output on to our own stream of that name ("stdout", "stderr").

    Raises:
        Exit: Nobody reads it any more; we end as a program would that SIGPIPE ends.
        NixletError: It can't be written for another reason.
    """
    fd = 2 if stream == "stderr" else 1
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # Somebody else made the file non-blocking; it is shared with them.
            os.set_blocking(fd, True)
        except BrokenPipeError:
            raise Exit(READER_GONE) from None
        except OSError as error:
            if error.errno == errno.EIO and os.isatty(fd):
                # The terminal is gone.
                raise Exit(TERMINAL_GONE) from None
            from nixlet.host import files

            raise files.refused(
                f"{'standard error' if fd == 2 else 'standard output'} can't be written", error
            ) from error


def reader_is_gone() -> bool:
    """Whether nobody reads standard output any more; for verbs that would print for ever."""
    failure = _failure(sys.stdout)
    return failure is not None and failure.errno == errno.EPIPE


def finish(status: int) -> tuple[int, errors.NixletError | None]:
    """Write out what is left; the exit status, and the error for output that was lost while somebody wanted it.

    Args:
        status: The verb's own.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    failure = _failure(sys.stdout)
    if failure is None or failure.errno == errno.EPIPE:
        return status, None
    reason = os.strerror(failure.errno or errno.EIO)
    return status or 125, errors.FailedPreconditionError(
        f"standard output can't be written: {reason}", hint="make room where it goes, or send it elsewhere"
    )


def _failure(stream: object) -> OSError | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, Output) else None
