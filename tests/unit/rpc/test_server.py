"""gRPC over unix sockets: limits, statuses, unknown methods, and the relay."""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h2.exceptions
import pytest
from grpclib import const
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.metadata import Deadline

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import frames, server, transport
from nixlet.rpc.gen import containerd_snapshots_grpc, containerd_snapshots_pb2
from nixlet.services import relay


class Backend:
    """Methods that show what arrives, and answer in every way that gRPC has."""

    def __init__(self) -> None:
        self.seen: list[tuple[bytes, dict[str, Any], float | None]] = []
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()

    async def echo(self, stream: Any) -> None:
        request = await stream.recv_message()
        remaining = stream.deadline.time_remaining() if stream.deadline else None
        self.seen.append((request, dict(stream.metadata), remaining))
        await stream.send_initial_metadata(metadata={"x-first": "1"})
        await stream.send_message(b"re:" + request)
        await stream.send_trailing_metadata(metadata={"x-last": "2", "x-blob-bin": b"\x00\xff"})

    async def many(self, stream: Any) -> None:
        await stream.recv_message()
        for number in range(3):
            await stream.send_message(bytes([number]))

    async def fail(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_initial_metadata()
        await stream.send_trailing_metadata(
            status=Status.NOT_FOUND,
            status_message="no such thing: 100 %",
            status_details=b"\x08\x05detail",
            metadata={"x-last": "2"},
        )

    async def hang(self, stream: Any) -> None:
        await stream.recv_message()
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def refuse(self, stream: Any) -> None:
        await stream.recv_message()
        raise errors.FailedPreconditionError("it is not so", hint="make it so")

    async def crash(self, stream: Any) -> None:
        await stream.recv_message()
        raise KeyError("secret")

    def __mapping__(self) -> dict[str, const.Handler]:
        methods = {"Echo": self.echo, "Fail": self.fail, "Hang": self.hang, "Refuse": self.refuse, "Crash": self.crash}
        mapping = {
            f"/test.Backend/{name}": const.Handler(method, Cardinality.UNARY_UNARY, bytes, bytes)
            for name, method in methods.items()
        }
        mapping["/test.Backend/Many"] = const.Handler(self.many, Cardinality.UNARY_STREAM, bytes, bytes)
        return mapping


@contextlib.asynccontextmanager
async def serving(path: Path, *handlers: Any, fallback: Any = None) -> AsyncIterator[channels.Channel]:
    async with (
        server.serve(unixsocket.listen(str(path)), handlers, fallback=fallback),
        channels.connect(str(path)) as channel,
    ):
        yield channel


@contextlib.asynccontextmanager
async def relaying(path: Path, channel: channels.Channel, peer: str = "the backend") -> AsyncIterator[channels.Channel]:
    handing_on = relay.Relay(channel, peer)

    async def fallback(path: str, stream: Any) -> None:
        await handing_on.answer(path, stream, await stream.recv_message())

    async with serving(path, fallback=fallback) as relayed:
        yield relayed


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[tuple[Backend, channels.Channel]]:
    handler = Backend()
    async with serving(tmp_path / "d" / "b.sock", handler) as channel:
        yield handler, channel


@pytest.fixture
async def relayed(backend: tuple[Backend, channels.Channel], tmp_path: Path) -> AsyncIterator[channels.Channel]:
    async with relaying(tmp_path / "d" / "r.sock", backend[1]) as channel:
        yield channel


async def call(
    channel: channels.Channel, method: str, request: bytes = b"", *, timeout: float | None = None, **metadata: Any
) -> tuple[list[bytes], Any, Any]:
    path = f"/test.Backend/{method}"
    headers = {key.replace("_", "-"): value for key, value in metadata.items()}
    async with channel.request(
        path, Cardinality.UNARY_STREAM, bytes, bytes, timeout=timeout, metadata=headers
    ) as stream:
        await stream.send_message(request, end=True)
        messages = [message async for message in stream]
        await stream.recv_trailing_metadata()
        return messages, stream.initial_metadata, stream.trailing_metadata


async def exchange(request: Any, *, deadline: Deadline | None = None) -> None:
    """Make a call step by step; its deadline is told to the server, and not watched here."""
    async with request as stream:
        transport.announce_deadline(stream, deadline)
        await stream.send_message(b"", end=True)
        await stream.recv_message()
        await stream.recv_trailing_metadata()


async def test_the_relay_keeps_messages_metadata_and_trailers(
    backend: tuple[Backend, channels.Channel], relayed: channels.Channel
) -> None:
    messages, first, last = await call(
        relayed, "Echo", b"\x00raw\xff", timeout=30, containerd_namespace="k8s.io", x_bin=b"\x01\xfe"
    )
    assert messages == [b"re:\x00raw\xff"]
    assert first["x-first"] == "1"
    assert (last["x-last"], last["x-blob-bin"]) == ("2", b"\x00\xff")
    request, metadata, remaining = backend[0].seen[0]
    assert request == b"\x00raw\xff"
    assert (metadata["containerd-namespace"], metadata["x-bin"]) == ("k8s.io", b"\x01\xfe")
    assert remaining is not None
    assert 0 < remaining <= 30


async def test_the_relay_keeps_streams(relayed: channels.Channel) -> None:
    messages, _, _ = await call(relayed, "Many")
    assert messages == [b"\x00", b"\x01", b"\x02"]


async def test_the_relay_keeps_statuses_and_their_details(
    relayed: channels.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    request = relayed.request("/test.Backend/Fail", Cardinality.UNARY_UNARY, bytes, bytes)
    with pytest.raises(GRPCError) as caught:
        await exchange(request)
    assert caught.value.status is Status.NOT_FOUND
    assert caught.value.message == "no such thing: 100 %"
    assert caught.value.details == b"\x08\x05detail"
    assert request.trailing_metadata is not None
    assert request.trailing_metadata["x-last"] == "2"
    # That the backend says no is nothing to report.
    assert not caplog.records


async def test_the_backend_itself_says_that_a_method_is_unknown(relayed: channels.Channel) -> None:
    with pytest.raises(GRPCError) as caught:
        await call(relayed, "NoSuchMethod")
    assert caught.value.status is Status.UNIMPLEMENTED
    assert caught.value.message == "unknown method /test.Backend/NoSuchMethod"


async def test_a_deadline_ends_the_call_at_the_backend(
    backend: tuple[Backend, channels.Channel], relayed: channels.Channel
) -> None:
    with pytest.raises((GRPCError, TimeoutError)):
        await call(relayed, "Hang", timeout=0.3)
    await asyncio.wait_for(backend[0].cancelled.wait(), 10)


async def test_a_deadline_that_the_client_does_not_watch_is_answered_as_such(
    relayed: channels.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    answered = 0
    while answered < 10:
        request = relayed.request("/test.Backend/Hang", Cardinality.UNARY_UNARY, bytes, bytes)
        with pytest.raises((GRPCError, TimeoutError)) as caught:
            await exchange(request, deadline=Deadline.from_timeout(0.05))
        # On a busy machine the time may be over before the request is on its way: grpclib doesn't send it then.
        if isinstance(caught.value, GRPCError):
            assert caught.value.status is Status.DEADLINE_EXCEEDED
            answered += 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_client_that_gives_up_ends_the_call_at_the_backend(
    backend: tuple[Backend, channels.Channel], relayed: channels.Channel
) -> None:
    task = asyncio.create_task(call(relayed, "Hang"))
    await asyncio.wait_for(backend[0].started.wait(), 10)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await asyncio.wait_for(backend[0].cancelled.wait(), 10)


async def test_a_backend_that_is_away_is_named(tmp_path: Path) -> None:
    async with (
        channels.connect(str(tmp_path / "nobody.sock")) as nobody,
        relaying(tmp_path / "d" / "r.sock", nobody, "containerd at /run/x.sock") as channel,
    ):
        with pytest.raises(GRPCError) as caught:
            await call(channel, "Echo")
    assert caught.value.status is Status.UNAVAILABLE
    assert "containerd at /run/x.sock can't be reached" in (caught.value.message or "")


async def test_an_answer_beyond_the_limit_is_not_handed_on(tmp_path: Path) -> None:
    class Huge(Backend):
        async def echo(self, stream: Any) -> None:
            await stream.recv_message()
            await stream.send_initial_metadata()
            size = transport.MAX_MESSAGE + 1
            await stream._sender.send_message(stream.number, bytes(size))

    async with (
        serving(tmp_path / "d" / "b.sock", Huge()) as channel,
        relaying(tmp_path / "d" / "r.sock", channel) as relayed,
    ):
        # More than once, and then another call: what nobody reads must not use up the connections' windows.
        for _ in range(2):
            with pytest.raises(GRPCError) as caught:
                await call(relayed, "Echo")
            assert caught.value.status is Status.RESOURCE_EXHAUSTED
        assert len((await call(relayed, "Many"))[0]) == 3


async def refusal(channel: channels.Channel, head: bytes) -> Status:
    """The status of a call that the server ends at the head of its message, before the rest is sent.

    The server resets the stream right behind the status, and grpclib's client may see that first: so the headers are read.
    """
    request = channel.request("/test.Backend/Echo", Cardinality.UNARY_UNARY, bytes, bytes)
    ended = (GRPCError, StreamTerminatedError, ProtocolError, h2.exceptions.StreamClosedError)
    with contextlib.suppress(*ended):
        async with request as stream:
            await stream.send_request()
            await stream._stream.send_data(head)
            await asyncio.wait_for(stream.recv_message(), 10)
    headers = request._stream.headers
    assert headers is not None
    return Status(int(dict(headers)["grpc-status"]))


async def test_messages_beyond_the_limit_are_refused_unreceived(backend: tuple[Backend, channels.Channel]) -> None:
    handler, channel = backend
    size = transport.MAX_MESSAGE + 1
    assert await refusal(channel, b"\x00" + size.to_bytes(4, "big")) is Status.RESOURCE_EXHAUSTED
    assert not handler.seen


async def test_a_message_at_the_limit_passes(backend: tuple[Backend, channels.Channel]) -> None:
    handler, channel = backend
    await call(channel, "Echo", b"x" * (transport.MAX_MESSAGE - 3))
    assert len(handler.seen[0][0]) == transport.MAX_MESSAGE - 3


async def test_compressed_messages_are_refused(backend: tuple[Backend, channels.Channel]) -> None:
    assert await refusal(backend[1], b"\x01\x00\x00\x00\x01x") is Status.UNIMPLEMENTED


async def test_our_errors_become_statuses_with_their_hint(backend: tuple[Backend, channels.Channel]) -> None:
    with pytest.raises(GRPCError) as caught:
        await call(backend[1], "Refuse")
    assert (caught.value.status, caught.value.message) == (Status.FAILED_PRECONDITION, "it is not so; hint: make it so")


async def test_the_unexpected_is_logged_and_not_told(
    backend: tuple[Backend, channels.Channel], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(GRPCError) as caught:
        await call(backend[1], "Crash")
    assert (caught.value.status, caught.value.message) == (Status.INTERNAL, "internal error: KeyError")
    assert "secret" in caplog.text


async def test_statuses_become_our_errors(tmp_path: Path) -> None:
    class Snapshots(containerd_snapshots_grpc.SnapshotsBase):
        async def Stat(self, stream: Any) -> None:  # noqa: N802 (as on the wire)
            await stream.recv_message()
            raise errors.NotFoundError("snapshot x does not exist")

        Prepare = View = Mounts = Commit = Remove = Update = List = Usage = Cleanup = Stat

    async with serving(tmp_path / "d" / "s.sock", Snapshots()) as channel:
        stub = containerd_snapshots_grpc.SnapshotsStub(channel)
        with pytest.raises(errors.NotFoundError, match="snapshot x does not exist"), channels.translated("the peer"):
            await stub.Stat(containerd_snapshots_pb2.StatSnapshotRequest(key="x"))


async def test_running_calls_may_end_when_the_server_stops(tmp_path: Path) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    class Slow(Backend):
        async def echo(self, stream: Any) -> None:
            await stream.recv_message()
            started.set()
            await release.wait()
            await stream.send_message(b"done")

    async with contextlib.AsyncExitStack() as client:
        async with server.serve(unixsocket.listen(str(tmp_path / "d" / "s.sock")), [Slow()]):
            channel = await client.enter_async_context(channels.connect(str(tmp_path / "d" / "s.sock")))
            running = asyncio.create_task(call(channel, "Echo"))
            await started.wait()
            asyncio.get_running_loop().call_later(0.1, release.set)
        assert (await running)[0] == [b"done"]


async def test_a_peer_that_goes_away_cuts_no_call_off(tmp_path: Path) -> None:
    """The GOAWAY comes in one piece with an answer, while another call on the connection is still being answered."""
    started, release, connections = asyncio.Event(), asyncio.Event(), set[int]()

    class Leaving(Backend):
        async def echo(self, stream: Any) -> None:
            await stream.recv_message()
            connections.add(id(stream._sender))
            started.set()
            await release.wait()
            await stream.send_message(b"later")

        async def fail(self, stream: Any) -> None:
            await stream.recv_message()
            connections.add(id(stream._sender))
            await stream.send_message(b"now")
            await stream.send_trailing_metadata()
            stream._sender.write(frames.go_away(frames.MAX_STREAM))

    async with serving(tmp_path / "d" / "s.sock", Leaving()) as channel:
        slow = asyncio.create_task(call(channel, "Echo"))
        await asyncio.wait_for(started.wait(), 10)
        assert (await call(channel, "Fail"))[0] == [b"now"]
        first = channel._protocol
        assert len(connections) == 1
        # The next call goes elsewhere; the one under way gets its answer, and then the connection ends.
        assert (await call(channel, "Fail"))[0] == [b"now"]
        assert len(connections) == 2
        release.set()
        assert (await slow)[0] == [b"later"]
        assert first is not None
        assert first.connection.is_closing()


async def test_calls_that_go_on_are_ended_and_connections_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_GRACE", 0.05)
    backend, path = Backend(), str(tmp_path / "d" / "s.sock")
    async with channels.connect(path) as channel:
        async with server.serve(unixsocket.listen(path), [backend]):
            running = asyncio.create_task(call(channel, "Hang"))
            await asyncio.wait_for(backend.started.wait(), 10)
        with pytest.raises(StreamTerminatedError):
            await asyncio.wait_for(running, 10)
        assert backend.cancelled.is_set()
        # Nor does the old connection lead to a server that has stopped.
        with pytest.raises(ConnectionRefusedError):
            await call(channel, "Echo")
        # Its name stays: a service manager may hold the socket for the next of us.
        assert (tmp_path / "d" / "s.sock").is_socket()
    assert not backend.seen


async def test_a_client_that_gives_up_does_not_end_what_the_service_shields(tmp_path: Path) -> None:
    started, release, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        await release.wait()
        done.set()

    class Shielding(Backend):
        async def echo(self, stream: Any) -> None:
            await stream.recv_message()
            self.work = asyncio.create_task(work())
            try:
                await asyncio.shield(self.work)
            except asyncio.CancelledError:
                self.cancelled.set()
                raise

    handler = Shielding()
    async with serving(tmp_path / "d" / "s.sock", handler) as channel:
        client = asyncio.create_task(call(channel, "Echo"))
        await asyncio.wait_for(started.wait(), 10)
        client.cancel()
        await asyncio.wait_for(handler.cancelled.wait(), 10)
        release.set()
        await asyncio.wait_for(done.wait(), 10)


@pytest.mark.parametrize("raised", [TimeoutError("secret"), StreamTerminatedError("secret"), OSError("secret")])
async def test_what_happened_elsewhere_is_not_taken_for_the_calls_own_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, raised: Exception
) -> None:
    class Broken(Backend):
        async def echo(self, stream: Any) -> None:
            await stream.recv_message()
            raise raised

    async with serving(tmp_path / "d" / "s.sock", Broken()) as channel:
        with pytest.raises(GRPCError) as caught:
            await call(channel, "Echo")
    assert (caught.value.status, caught.value.message) == (Status.INTERNAL, f"internal error: {type(raised).__name__}")
    assert [record.name for record in caplog.records] == ["nixlet.rpc"]


@pytest.mark.parametrize(
    ("number", "code", "hint"),
    [
        (errno.ENOSPC, Status.RESOURCE_EXHAUSTED, "make room on that file system, or choose another directory"),
        (errno.EIO, Status.UNAVAILABLE, "the kernel's log says what the disk's trouble is: dmesg"),
    ],
)
async def test_a_disk_in_trouble_is_told_whoever_comes_upon_it(
    tmp_path: Path, number: int, code: Status, hint: str
) -> None:
    class Writing(Backend):
        async def echo(self, stream: Any) -> None:
            await stream.recv_message()
            raise OSError(number, "secret", "/data/x")

    async with serving(tmp_path / "d" / "s.sock", Writing()) as channel:
        with pytest.raises(GRPCError) as caught:
            await call(channel, "Echo")
    assert caught.value.status is code
    assert caught.value.message == f"/data/x can't be used: {os.strerror(number)}; hint: {hint}"


async def test_calls_beyond_the_limit_wait_and_huge_headers_end_the_connection(
    backend: tuple[Backend, channels.Channel],
) -> None:
    handler, channel = backend
    await call(channel, "Many")
    calls = [asyncio.create_task(call(channel, "Hang")) for _ in range(110)]
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call(channel, "Echo"), 0.3)
    for each in calls:
        each.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert not handler.seen
    assert (await call(channel, "Echo", b"x"))[0] == [b"re:x"]
    with pytest.raises(StreamTerminatedError):
        await call(channel, "Echo", x_long="v" * (64 << 10))
    assert len(handler.seen) == 1


async def test_calls_wait_at_a_server_that_is_not_answering_yet(tmp_path: Path) -> None:
    """The client is greeted at once, as grpc-go wants it; its call gets its answer in time."""
    path = str(tmp_path / "s.sock")
    async with server.accepting(unixsocket.listen(path)) as accepting, channels.connect(path) as channel:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        greeting = await asyncio.wait_for(reader.readexactly(9), 20)
        assert greeting[3] == 4, "SETTINGS comes first (RFC 9113, section 3.4)"
        writer.close()
        calling = asyncio.create_task(call(channel, "Echo", b"x"))
        done, _ = await asyncio.wait([calling], timeout=0.1)
        assert not done
        async with accepting.answering([Backend()]):
            assert (await asyncio.wait_for(calling, 20))[0] == [b"re:x"]


async def test_a_server_that_ends_before_it_answers_says_so(tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    async with channels.connect(path) as channel:
        async with server.accepting(unixsocket.listen(path)):
            calling = asyncio.create_task(call(channel, "Echo", b"x"))
            await asyncio.wait([calling], timeout=0.1)
        with pytest.raises(GRPCError) as caught:
            await asyncio.wait_for(calling, 20)
        assert caught.value.status is Status.UNAVAILABLE
