"""Waiting in the event loop until a descriptor can be read or written."""

import asyncio


async def ready(fd: int, *, writing: bool = False) -> None:
    """Wait until a pipe or a socket can be read or written, or its other side is gone; plain files always can.

    Args:
        fd: The descriptor; it is not made non-blocking. Where others read it as well, it may be empty again by then.
        writing: Wait for room, not for data.
    """
    loop = asyncio.get_running_loop()
    able = asyncio.Event()
    try:
        (loop.add_writer if writing else loop.add_reader)(fd, able.set)
    except PermissionError:
        # What epoll can't wait for (epoll_ctl(2), EPERM).
        return
    try:
        await able.wait()
    finally:
        (loop.remove_writer if writing else loop.remove_reader)(fd)
