"""What a Nix daemon won't do on command: break off, talk nonsense, fail in the middle. A fake one on a real socket."""

import asyncio
import contextlib
import errno
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixlet import errors
from nixlet.store import closures, paths, policy, realiser
from nixlet.store.daemon import client, wire
from nixlet.telemetry import progress
from support.nixpeer import LAST, Peer, daemon, failure

PRESENT = paths.from_name("0" * 32 + "-present")
ABSENT = paths.from_name("1" * 32 + "-absent")


async def test_an_error_leaves_the_connection_good(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        assert (await peer.integer(), await peer.strings(), await peer.integer()) == (31, [PRESENT], 0)
        peer.send(failure("\x1b[31;1merror:\x1b[0m the \x1b[1mdatabase\x1b[0m\n  is busy"))
        assert await peer.valid_paths(PRESENT) == [PRESENT]

    async with daemon(tmp_path, script) as store, store.session() as session:
        with pytest.raises(errors.NixletError) as caught:
            await session.present([PRESENT])
        assert caught.value.message == "the database is busy"
        assert await session.present([PRESENT]) == {PRESENT}


@pytest.mark.parametrize(
    ("garbage", "message"),
    [
        (b"", "closed the connection"),
        (LAST[:5], "closed the connection"),
        (LAST + wire.integer(2) + wire.string(PRESENT), "closed the connection"),
        (wire.integer(0x1234), "unknown record 0x1234"),
        (wire.integer(wire.STDERR_READ), "only old versions"),
        (LAST + wire.integer(1 << 50), "a list of"),
        (LAST + wire.integer(1) + wire.integer(1 << 50), "a string of"),
        (wire.integer(wire.STDERR_NEXT) + wire.integer(1) + b"\xff" * 8, "padding"),
    ],
)
async def test_what_cuts_a_reply_short_closes_the_connection(tmp_path: Path, garbage: bytes, message: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        assert await peer.integer() == 31
        await peer.strings()
        await peer.integer()
        peer.send(garbage)
        peer.writer.write_eof()
        assert await peer.ended()

    async with daemon(tmp_path, script) as store, store.session() as session:
        with pytest.raises(errors.UnavailableError, match=message):
            await session.present([PRESENT])
        with pytest.raises(errors.UnavailableError, match="broke in an earlier request"):
            await session.present([PRESENT])
        assert session.requests == 2  # SetOptions and the one that failed


async def test_giving_up_in_the_middle_closes_the_connection(tmp_path: Path) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.greet()
        assert await peer.integer() == 31
        await peer.strings()
        await peer.integer()
        peer.send(LAST + wire.integer(1))
        asked.set()
        assert await peer.ended()
        gone.set()

    async with daemon(tmp_path, script) as store, store.session() as session:
        request = asyncio.create_task(session.present([PRESENT]))
        await asked.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        # The daemon learns of it at once, and not when the session ends.
        async with asyncio.timeout(10):
            await gone.wait()
        with pytest.raises(errors.UnavailableError, match="broke in an earlier request"):
            await session.present([PRESENT])


async def test_a_daemon_that_dies_among_many_requests(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        for _ in range(3):
            assert await peer.integer() == 11
            await peer.string()
            peer.send(LAST, wire.integer(1))
        await peer.writer.drain()
        peer.writer.transport.abort()

    many = [paths.from_name(f"{number:032}-x") for number in range(20_000)]
    async with daemon(tmp_path, script) as store, store.session() as session:
        with pytest.raises(errors.UnavailableError, match="the Nix daemon closed the connection"):
            await session.hold(many)
    assert caplog.records == []


async def test_one_bad_answer_among_many_is_told_after_the_last(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        for answer in (LAST + wire.integer(1), failure("no such path"), LAST + wire.integer(1)):
            assert await peer.integer() == 11
            await peer.string()
            peer.send(answer)
        await peer.valid_paths()

    async with daemon(tmp_path, script) as store, store.session() as session:
        with pytest.raises(errors.NixletError, match="no such path"):
            await session.hold([PRESENT, ABSENT, PRESENT])
        assert await session.present([]) == set()


async def test_a_failing_plan_does_not_stop_the_work(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet(1 << 8 | 33)  # so old that results don't come by path
        assert (await peer.integer(), await peer.string()) == (11, ABSENT)
        peer.send(LAST, wire.integer(1))
        await peer.valid_paths()
        assert (await peer.integer(), await peer.strings()) == (40, [ABSENT])
        peer.send(failure("unable to download"))
        assert (await peer.integer(), await peer.strings(), await peer.integer()) == (9, [ABSENT], 0)
        started = wire.integer(wire.START_ACTIVITY) + wire.integer(7) + wire.integer(3)
        peer.send(started, wire.integer(101), wire.string("fetching"), wire.integer(0), wire.integer(0))
        done = wire.integer(wire.RESULT) + wire.integer(7) + wire.integer(105) + wire.integer(1)
        peer.send(done, wire.integer(0), wire.integer(4321), wire.integer(wire.STOP_ACTIVITY), wire.integer(7))
        peer.send(LAST, wire.integer(1))
        await peer.valid_paths(ABSENT)

    steps: list[progress.Progress] = []
    async with daemon(tmp_path, script) as store, store.session() as session:
        took = await session.realise([ABSENT], steps.append)
    assert (took.fetched_paths, took.fetched_bytes) == (1, 4321)
    assert [(step.done, step.total, step.unit) for step in steps] == [
        (0, 1, "paths"),
        (4321, 0, "bytes"),
        (1, 1, "paths"),
    ]


async def test_paths_of_another_store_are_refused(tmp_path: Path) -> None:
    async def script(peer: Peer) -> None:
        await peer.greet()
        await peer.valid_paths("/etc/passwd")

    async with daemon(tmp_path, script) as store, store.session() as session:
        with pytest.raises(errors.InvalidArgumentError, match="'/etc/passwd' is not a store path"):
            await session.present([PRESENT])


@pytest.mark.parametrize(
    ("greeting", "kind", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", errors.UnavailableError, "served by something else"),
        (b"", errors.UnavailableError, "closed the connection"),
        (
            wire.integer(wire.SERVER_MAGIC) + wire.integer(1 << 8 | 26),
            errors.UnavailableError,
            r"1\.26, older than 1\.27",
        ),
        (wire.integer(wire.SERVER_MAGIC) + wire.integer(2 << 8), errors.UnavailableError, r"speaks protocol 2\.0"),
        (
            wire.integer(wire.SERVER_MAGIC) + wire.integer(1 << 8 | 32) + failure("user 'x' is not allowed to connect"),
            errors.PermissionDeniedError,
            "refuses the connection: user 'x' is not allowed",
        ),
    ],
)
async def test_a_handshake_that_fails_says_why(
    tmp_path: Path, greeting: bytes, kind: type[errors.NixletError], message: str
) -> None:
    async def script(peer: Peer) -> None:
        peer.send(greeting)
        await peer.writer.drain()
        peer.writer.write_eof()
        await peer.reader.read()

    async with daemon(tmp_path, script) as store:
        with pytest.raises(kind, match=message):
            async with store.session():
                pass


async def test_a_daemon_that_never_sets_the_options_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_OPEN_TIMEOUT", 0.2)

    async def script(peer: Peer) -> None:
        monkeypatch.setattr(peer, "asked_for_options", peer.ended)
        await peer.greet()

    async with daemon(tmp_path, script) as store, asyncio.timeout(10):
        with pytest.raises(errors.UnavailableError, match=r"^the Nix daemon does not answer$"):
            async with store.session():
                pass


@contextlib.contextmanager
def busy(path: Path) -> Iterator[socket.socket]:
    """A listening socket whose queue is full, of those who are gone by now."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0)
        number = 0
        while not number:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as waiting:
                number = waiting.connect_ex(str(path))
        assert number == errno.EAGAIN
        yield listening


async def test_a_daemon_that_is_too_busy_to_take_a_connection_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, wait = asyncio.Event(), asyncio.sleep

    async def sleep(seconds: float) -> None:
        tried.set()
        await wait(seconds)

    serving: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        peer = Peer(reader, writer)
        with contextlib.suppress(asyncio.IncompleteReadError):  # those who only fill the queue
            await peer.greet()
            await peer.valid_paths(PRESENT)
            assert await peer.ended()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    path = tmp_path / "socket"
    store = client.DaemonStore(client.DaemonSettings(socket=str(path), stdio=("no-nix-daemon",)))

    async def ask() -> set[paths.StorePath]:
        async with store.session() as session:
            return await session.present([PRESENT])

    with busy(path) as listening:
        monkeypatch.setattr(client, "_OPEN_TIMEOUT", 0.1)
        with pytest.raises(errors.UnavailableError, match=r"^the Nix daemon does not answer$"):
            await ask()
        monkeypatch.setattr(client, "_OPEN_TIMEOUT", 10)
        monkeypatch.setattr(asyncio, "sleep", sleep)
        async with asyncio.timeout(10):
            asking = asyncio.create_task(ask())
            await tried.wait()
            async with await asyncio.start_unix_server(serve, sock=listening):
                assert await asking == {PRESENT}
                await asyncio.gather(*filter(None, serving))
    assert len(serving) > 1


async def test_a_socket_that_cannot_be_opened_is_not_blamed_on_rights(tmp_path: Path) -> None:
    path = str(tmp_path / ("x" * 120))
    store = client.DaemonStore(client.DaemonSettings(socket=path, stdio=("no-nix-daemon",)))
    with pytest.raises(errors.UnavailableError, match="can't be opened: AF_UNIX path too long") as caught:
        async with store.session():
            pass
    assert caught.value.hint == ""


#: A daemon on standard streams, of protocol 1.27, that dies in its first request.
DIES = f"""#!{sys.executable}
import struct, sys
def read(count):
    sys.stdin.buffer.read(count)
def say(*numbers):
    sys.stdout.buffer.write(struct.pack(f"<{{len(numbers)}}Q", *numbers))
    sys.stdout.flush()
read(16)
say({wire.SERVER_MAGIC}, {1 << 8 | 27})
read(16)
say({wire.STDERR_LAST})
read(8 + 12 * 8 + 8)
say({wire.STDERR_LAST})
read(8)
sys.exit("error: the database is damaged\\n       and can't be read")
"""


async def test_what_a_child_says_when_it_dies_is_told(tmp_path: Path) -> None:
    program = tmp_path / "nix-daemon"
    program.write_text(DIES)
    program.chmod(0o755)
    store = client.DaemonStore(client.DaemonSettings(socket=str(tmp_path / "none"), stdio=(str(program),)))
    why = r"^the Nix daemon closed the connection: the database is damaged and can't be read$"
    async with store.session() as session:
        with pytest.raises(errors.UnavailableError, match=why):
            await session.present([PRESENT])


async def test_who_wants_nothing_fetched_waits_for_nix_some_seconds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is served by who fetched the same closure and holds it."""
    monkeypatch.setattr(realiser, "_ANSWER_TIMEOUT", 0.2)
    silent = asyncio.Event()

    async def script(peer: Peer) -> None:
        silent.set()
        await peer.reader.read()

    async with daemon(tmp_path, script) as store:
        monkeypatch.setattr(store, "awaited", lambda: "process 7 holds the lock")
        bringer = realiser.Realiser(store, policy.Policy())
        reference = closures.ClosureReference(None, (PRESENT,))
        async with asyncio.timeout(10):
            with pytest.raises(
                errors.UnavailableError, match=r"^Nix does not answer: process 7 holds the lock$"
            ) as caught:
                async with bringer.realised(reference, fetch=False):
                    pass
        assert "try again" in caught.value.hint
        assert silent.is_set()
        assert not bringer._running
