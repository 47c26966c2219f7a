"""What systemd hears."""

import asyncio
import os
import socket
from pathlib import Path

from nixlet.host import sdnotify


async def test_ready_alive_and_stopping(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        environment = {
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "40000",
            "WATCHDOG_PID": str(os.getpid()),
        }
        async with sdnotify.Notifier(environment).ready():
            await asyncio.sleep(0.1)
        heard = []
        while True:
            try:
                heard.append(manager.recv(100))
            except BlockingIOError:
                break
    assert heard[0] == b"READY=1"
    assert heard.count(b"WATCHDOG=1") >= 2
    assert heard[-1] == b"STOPPING=1"


async def test_without_a_manager_it_is_silent() -> None:
    async with sdnotify.Notifier({}).ready():
        pass


def test_the_watchdog_of_another_process_is_not_ours() -> None:
    environment = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000000"}
    assert sdnotify.Notifier({**environment, "WATCHDOG_PID": "1"}).watchdog == 0
    assert sdnotify.Notifier(environment).watchdog == 1
    sdnotify.Notifier(environment).tell("READY=1")


def test_another_socket_takes_the_place_of_the_one_that_was_kept(tmp_path: Path) -> None:
    """The manager has room for one, and hands over whichever it has."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as kept,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        notifier = sdnotify.Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        for anew, heard in ((True, [b"FDSTOREREMOVE=1\nFDNAME=nixlet"]), (False, [])):
            assert notifier.keep(kept, anew=anew)
            for each in heard:
                assert manager.recv(100) == each
            message, fds, _, _ = socket.recv_fds(manager, 100, 2)
            assert (message, len(fds)) == (b"FDSTORE=1\nFDNAME=nixlet", 1)
            os.close(fds[0])
