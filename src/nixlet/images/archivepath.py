"""Opening the file that an archive is, without harm. The command line reads this module: it imports nothing that takes time."""

import os
import stat

from nixlet import errors


def opened(path: str, *, piped: bool = False) -> int:
    """Open an archive for reading; the caller closes it.

    Args:
        path: Where it is.
        piped: Whether it may be a pipe, which is waited for.

    Raises:
        NotFoundError: There is none.
        InvalidArgumentError: It can't be read, or is no file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | (0 if piped else os.O_NONBLOCK))
    except FileNotFoundError as error:
        raise errors.NotFoundError(f"there is no image archive {path}", hint="check the path") from error
    except OSError as error:
        raise errors.InvalidArgumentError(f"can't read the image archive {path}: {error.strerror}") from error
    if not piped and not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise errors.InvalidArgumentError(f"{path} is not an image archive: it is no regular file")
    return fd
