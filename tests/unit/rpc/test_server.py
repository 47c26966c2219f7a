"""gRPC over unix sockets: sockets, limits, statuses, unknown methods, and the relay."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h2.exceptions
import pytest
from grpclib import const
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError

from nixlet import errors
from nixlet.rpc import channel as channels
from nixlet.rpc import server, transport
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
        await stream.send_trailing_metadata(
            status=Status.NOT_FOUND, status_message="no such thing: 100 %", status_details=b"\x08\x05detail"
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
        server.serve(server.listen_unix(str(path)), handlers, fallback=fallback),
        channels.connect(str(path)) as channel,
    ):
        yield channel


@pytest.fixture
async def backend(tmp_path: Path) -> AsyncIterator[tuple[Backend, channels.Channel]]:
    handler = Backend()
    async with serving(tmp_path / "d" / "b.sock", handler) as channel:
        yield handler, channel


@pytest.fixture
async def relayed(backend: tuple[Backend, channels.Channel], tmp_path: Path) -> AsyncIterator[channels.Channel]:
    handing_on = relay.Relay(backend[1], "the backend")

    async def fallback(path: str, stream: Any) -> None:
        await handing_on.answer(path, stream, await stream.recv_message())

    async with serving(tmp_path / "d" / "r.sock", fallback=fallback) as channel:
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


async def test_the_relay_keeps_statuses_and_their_details(relayed: channels.Channel) -> None:
    with pytest.raises(GRPCError) as caught:
        await call(relayed, "Fail")
    assert caught.value.status is Status.NOT_FOUND
    assert caught.value.message == "no such thing: 100 %"
    assert caught.value.details == b"\x08\x05detail"


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
    async with channels.connect(str(tmp_path / "nobody.sock")) as nobody:
        handing_on = relay.Relay(nobody, "containerd at /run/x.sock")

        async def fallback(path: str, stream: Any) -> None:
            await handing_on.answer(path, stream, await stream.recv_message())

        async with serving(tmp_path / "d" / "r.sock", fallback=fallback) as channel:
            with pytest.raises(GRPCError) as caught:
                await call(channel, "Echo")
    assert caught.value.status is Status.UNAVAILABLE
    assert "containerd at /run/x.sock can't be reached" in (caught.value.message or "")


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
    assert (caught.value.status, caught.value.message) == (Status.FAILED_PRECONDITION, "it is not so\nhint: make it so")


async def test_the_unexpected_is_logged_and_not_told(
    backend: tuple[Backend, channels.Channel], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(GRPCError) as caught:
        await call(backend[1], "Crash")
    assert (caught.value.status, caught.value.message) == (Status.INTERNAL, "internal error: KeyError")
    assert "secret" in caplog.text


async def test_statuses_become_our_errors(tmp_path: Path) -> None:
    class Snapshots(containerd_snapshots_grpc.SnapshotsBase):
        async def Stat(self, stream: Any) -> None:  # noqa: N802
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
        async with server.serve(server.listen_unix(str(tmp_path / "d" / "s.sock")), [Slow()]):
            channel = await client.enter_async_context(channels.connect(str(tmp_path / "d" / "s.sock")))
            running = asyncio.create_task(call(channel, "Echo"))
            await started.wait()
            asyncio.get_running_loop().call_later(0.1, release.set)
        assert (await running)[0] == [b"done"]


def test_a_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    with server.listen_unix(str(tmp_path / "d" / "s.sock")):
        assert (tmp_path / "d").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "d" / "s.sock").stat().st_mode & 0o777 == 0o600


def test_a_served_socket_is_not_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "d" / "s.sock")
    with server.listen_unix(path), pytest.raises(errors.FailedPreconditionError, match="another process serves"):
        server.listen_unix(path)
    # Closed and left behind: stale, so it is replaced.
    assert os.path.exists(path)
    server.listen_unix(path).close()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(errors.FailedPreconditionError, match="is no socket"):
        server.listen_unix(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.FailedPreconditionError, match="can't listen on"):
        server.listen_unix(str(tmp_path / ("x" * 120)))


def test_is_served(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    assert not server.is_served(path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        assert not server.is_served(path)
        sock.listen()
        assert server.is_served(path)
