"""What the host tells of processes and of its ports."""

import asyncio
import os
import signal
import socket
import subprocess
import sys

import pytest

from nixlet.host import ports, procfs, signals


def test_which_signals_a_process_heeds() -> None:
    program = (
        "import signal, sys; signal.signal(10, print); signal.signal(12, signal.SIG_IGN); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        heeded = {
            number for number in (10, 12, signal.SIGTERM, signal.SIGKILL) if procfs.heeds_signal(process.pid, number)
        }
        assert heeded == {10, 12}
        process.kill()
    assert not procfs.heeds_signal(process.pid, 10)


@pytest.mark.parametrize(("kind", "protocol"), [(socket.SOCK_STREAM, "TCP"), (socket.SOCK_DGRAM, "UDP")])
@pytest.mark.parametrize(("bound", "asked"), [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", ""), ("0.0.0.0", "127.0.0.1")])
def test_a_port_that_a_program_has(kind: socket.SocketKind, protocol: str, bound: str, asked: str) -> None:
    with socket.socket(socket.AF_INET, kind) as server:
        server.bind((bound, 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        number = server.getsockname()[1]
        assert ports.is_taken(asked, number, protocol)
        assert not ports.is_taken("127.0.0.2", number, protocol) or bound == "0.0.0.0"
        assert not ports.is_taken(asked, number, "SCTP")
    assert not ports.is_taken(asked, number, protocol)


def test_a_connection_that_has_ended_does_not_take_a_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", number)) as client:
            accepted, _ = server.accept()
            accepted.close()
            client.recv(1)
    assert not ports.is_taken("127.0.0.1", number, "TCP")


async def test_a_wait_at_the_end_has_its_limit_and_can_be_hastened() -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    hanging = asyncio.create_task(hang())
    await asyncio.wait_for(signals.Ending(seconds=0.01).wait({hanging}), 5)
    assert hanging.cancelled()
    hastened = asyncio.Event()
    hastened.set()
    hanging = asyncio.create_task(hang())
    await asyncio.wait_for(signals.Ending(seconds=1000, hastened=hastened).wait({hanging}), 5)
    assert hanging.cancelled()


async def test_the_second_signal_hastens() -> None:
    stop = signals.watched()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(stop.requested.wait(), 10)
    assert not stop.hastened.is_set()
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.wait_for(stop.hastened.wait(), 10)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().remove_signal_handler(number)


async def test_a_terminal_that_closes_asks_once() -> None:
    stop = signals.watched()
    try:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.wait_for(stop.requested.wait(), 10)
            await asyncio.sleep(0.1)
        assert not stop.hastened.is_set()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().remove_signal_handler(number)


async def test_a_hangup_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = signals.watched()
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert not stop.requested.is_set()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(signal.SIGHUP, before)
