"""Varlink: our server as others' clients see it, our client against our server, and what a peer may do wrong."""

import array
import asyncio
import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import varlink

from nixlet import errors
from nixlet.host import unixsocket
from nixlet.varlink import client, server, wire

DESCRIPTION = """interface org.example.Test
method Double(number: int) -> (number: int)
method Count(to: int) -> (number: int)
method Fail(kind: string) -> ()
method Read(file: int) -> (text: string)
method Hang() -> ()
"""


class Number(msgspec.Struct, forbid_unknown_fields=True):
    number: int


class To(msgspec.Struct, forbid_unknown_fields=True):
    to: int


class Kind(msgspec.Struct, forbid_unknown_fields=True):
    kind: str


class File(msgspec.Struct, forbid_unknown_fields=True):
    file: int


class Service:
    """Methods for tests.

    Attributes:
        left: How many clients went while they were waited for.
        counts: How often ``Count`` was called.
        marks: How often ``Mark`` was called.
        went: How often nobody listened to it from the start.
    """

    def __init__(self) -> None:
        self.left = 0
        self.marks = 0
        self.counts = 0
        self.went = 0

    async def double(self, call: server.Call[Number]) -> Mapping[str, object]:
        return {"number": call.parameters.number * 2}

    async def count(self, call: server.Call[To]) -> Mapping[str, object]:
        self.counts += 1
        for number in range(call.parameters.to):
            await call.reply({"number": number})
        return {"number": call.parameters.to}

    async def fail(self, call: server.Call[Kind]) -> None:
        if call.parameters.kind == "CommandFailedError":
            raise errors.CommandFailedError("it ended", returncode=3, output="why", hint="mend it")
        if call.parameters.kind == "OSError":
            raise OSError(22, "broken")
        raise getattr(errors, call.parameters.kind)("so it is", hint="do this")

    async def read(self, call: server.Call[File]) -> Mapping[str, object]:
        return {"text": os.read(call.descriptor(call.parameters.file), 100).decode()}

    async def hand_over(self, call: server.Call[File]) -> None:
        for text in ("one", "two"):
            reading, writing = os.pipe()
            os.write(writing, text.encode())
            os.close(writing)
            await call.reply({}, [reading])
            os.close(reading)

    async def mark(self, call: server.Call[server.Nothing]) -> None:
        self.marks += 1
        self.went += call.gone.is_set()

    async def hang(self, call: server.Call[server.Nothing]) -> None:
        await call.gone.wait()
        self.left += 1


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
async def path(tmp_path: Path, service: Service) -> AsyncIterator[str]:
    methods = {
        "Double": server.Method(Number, service.double),
        "Count": server.Method(To, service.count, several=lambda wanted: wanted.to > 0),
        "Fail": server.Method(Kind, service.fail),
        "Read": server.Method(File, service.read),
        "HandOver": server.Method(File, service.hand_over, several=True),
        "Hang": server.Method(server.Nothing, service.hang),
        "Mark": server.Method(server.Nothing, service.mark),
    }
    place = str(tmp_path / "d" / "v.sock")
    async with server.serve(unixsocket.listen(place), [server.Interface("org.example.Test", DESCRIPTION, methods)]):
        yield place


def connected(path: str) -> client.Connection:
    return client.Connection(path, peer="the service")


async def in_thread(function: Callable[..., Any], *arguments: object) -> Any:
    return await asyncio.wait_for(asyncio.to_thread(function, *arguments), 20)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_another_client_reads_the_description_and_calls(path: str) -> None:
    def use() -> tuple[list[str], int, list[int]]:
        with varlink.Client.new_with_address(f"unix:{path}") as other, other.open("org.example.Test") as opened:
            several = [each["number"] for each in opened.Count(3, _more=True)]
            with other.open("org.varlink.service") as standard:
                interfaces = standard.GetInfo()["interfaces"]
            return interfaces, opened.Double(21)["number"], several

    interfaces, doubled, several = await in_thread(use)
    assert set(interfaces) == {"org.varlink.service", "org.example.Test"}
    assert (doubled, several) == (42, [0, 1, 2, 3])


async def test_calls_follow_each_other_on_one_connection(path: str) -> None:
    def use() -> list[int]:
        with connected(path) as connection:
            return [connection.call("org.example.Test.Double", {"number": each})["number"] for each in range(50)]

    assert await in_thread(use) == [2 * each for each in range(50)]


async def test_several_replies(path: str) -> None:
    def use() -> list[int]:
        with connected(path) as connection:
            return [each["number"] for each in connection.stream("org.example.Test.Count", {"to": 1000})]

    assert await in_thread(use) == list(range(1001))


@pytest.mark.parametrize("oneway", [False, True])
async def test_what_has_several_replies_is_not_begun_for_who_takes_one(
    path: str, service: Service, *, oneway: bool
) -> None:
    def use() -> list[Any]:
        with raw_socket(path) as raw:
            raw.sendall(called("Count", parameters={"to": 3}, more=oneway, oneway=oneway))
            raw.sendall(called("Count", parameters={"to": 0}))
            return raw_replies(raw, 1 if oneway else 2)

    refused = [] if oneway else [{"error": wire.EXPECTED_MORE, "parameters": {}}]
    assert await in_thread(use) == [*refused, {"parameters": {"number": 0}}]
    assert service.counts == 1


async def test_a_client_that_takes_one_reply_of_several_is_of_another_version(path: str) -> None:
    def use() -> None:
        with (
            connected(path) as connection,
            pytest.raises(errors.UnimplementedError, match=r"\(ExpectedMore\)$") as raised,
        ):
            connection.call("org.example.Test.Count", {"to": 3})
        assert "start the node again with this one" in raised.value.hint

    await in_thread(use)


@pytest.mark.parametrize("kind", ["NotFoundError", "UsageError", "CommandNotFoundError", "UnavailableError"])
async def test_errors_arrive_as_they_were_raised(path: str, kind: str) -> None:
    def use() -> None:
        with connected(path) as connection, pytest.raises(errors.NixletError) as raised:
            connection.call("org.example.Test.Fail", {"kind": kind})
        assert type(raised.value) is getattr(errors, kind)
        assert (raised.value.message, raised.value.hint) == ("so it is", "do this")

    await in_thread(use)


async def test_a_failed_program_is_told_with_what_it_said(path: str) -> None:
    def use() -> None:
        with connected(path) as connection, pytest.raises(errors.CommandFailedError) as raised:
            connection.call("org.example.Test.Fail", {"kind": "CommandFailedError"})
        assert (raised.value.returncode, raised.value.output, raised.value.hint) == (3, "why", "mend it")

    await in_thread(use)


async def test_an_internal_error_is_no_end_of_the_connection(path: str) -> None:
    def use() -> None:
        with connected(path) as connection:
            with pytest.raises(errors.NixletError, match="internal error: OSError"):
                connection.call("org.example.Test.Fail", {"kind": "OSError"})
            assert connection.call("org.example.Test.Double", {"number": 1}) == {"number": 2}

    await in_thread(use)


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("org.example.Test.Doubled", {}, "MethodNotFound: method Doubled"),
        ("org.example.Other.Double", {}, "InterfaceNotFound: interface org.example.Other"),
        ("org.example.Test.Double", {"number": "two"}, "InvalidParameter: parameter .*number"),
        ("org.example.Test.Double", {"number": 1, "more": 2}, "InvalidParameter: parameter .*more"),
        ("org.example.Test.Double", {}, "InvalidParameter: parameter .*number"),
    ],
)
async def test_who_speaks_another_version_gets_a_sentence(
    path: str, method: str, parameters: dict[str, object], said: str
) -> None:
    def use() -> None:
        with connected(path) as connection, pytest.raises(errors.UnimplementedError, match=said) as raised:
            connection.call(method, parameters)
        assert "start the node again with this one" in raised.value.hint

    await in_thread(use)


async def test_descriptors_come_beside_a_call_and_are_closed_after_it(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def use() -> None:
        with connected(path) as connection:
            for number in range(20):
                reading, writing = os.pipe()
                os.write(writing, b"piece %d" % number)
                os.close(writing)
                reply = connection.call("org.example.Test.Read", {"file": 1}, [0, reading])
                os.close(reading)
                assert reply == {"text": f"piece {number}"}
            with pytest.raises(errors.InvalidArgumentError, match="descriptor 3 and brought 1"):
                connection.call("org.example.Test.Read", {"file": 3}, [0])

    await in_thread(use)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_descriptors_come_beside_replies(path: str) -> None:
    def use() -> list[str]:
        with connected(path) as connection:
            list(connection.stream("org.example.Test.HandOver", {"file": 0}))
            first = connection.descriptor()
            with os.fdopen(first) as file:
                text = file.read()
            second = connection._descriptors[0]
        # What nobody took goes with the connection.
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(second)
        with pytest.raises(errors.NixletError, match="no descriptor"):
            connection.descriptor()
        return [text]

    assert await in_thread(use) == ["one"]


async def test_who_hands_over_too_many_descriptors_is_hung_up_on(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def use() -> None:
        with connected(path) as connection, pytest.raises(errors.UnavailableError, match="went away"):
            connection.call("org.example.Test.Read", {"file": 1}, [0] * (wire.MAX_DESCRIPTORS + 1))
        with connected(path) as connection:
            assert connection.call("org.example.Test.Double", {"number": 1}) == {"number": 2}

    await in_thread(use)
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_a_handler_learns_that_its_client_is_gone(path: str, service: Service) -> None:
    connection = connected(path)
    connection.send("org.example.Test.Hang")
    await asyncio.sleep(0.05)
    connection.close()
    await until(lambda: service.left == 1)


async def test_a_stop_tells_the_handlers(tmp_path: Path, service: Service) -> None:
    place = str(tmp_path / "v.sock")
    methods = {"Hang": server.Method(server.Nothing, service.hang)}
    async with server.serve(unixsocket.listen(place), [server.Interface("org.example.Test", DESCRIPTION, methods)]):
        connection = connected(place)
        connection.send("org.example.Test.Hang")
        await asyncio.sleep(0.05)
    assert service.left == 1
    with pytest.raises(errors.UnavailableError, match="went away"):
        await in_thread(connection.receive)
    connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"nonsense\0",
        b'{"method":1}\0',
        b'{"parameters":{}}\0',
        b'\xff\xfe{"method":"a.b"}\0',
        b"[" * 100_000 + b"\0",
    ],
)
async def test_what_is_no_call_ends_its_connection_only(path: str, data: bytes) -> None:
    def use() -> None:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(20)
            raw.connect(path)
            raw.sendall(data)
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(100) == b""
        with connected(path) as connection:
            assert connection.call("org.example.Test.Double", {"number": 1}) == {"number": 2}

    await in_thread(use)


async def test_a_message_without_end_is_not_gathered(path: str) -> None:
    def use() -> None:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(20)
            raw.connect(path)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                raw.sendall(b"x" * (2 * wire.MAX_MESSAGE))

    await in_thread(use)


async def test_who_sends_calls_and_reads_nothing_holds_nobody_up(path: str) -> None:
    def use() -> None:
        call = (
            json.dumps({"method": "org.example.Test.Count", "parameters": {"to": 5000}, "more": True}).encode() + b"\0"
        )
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(path)
            raw.setblocking(False)
            sent = 0
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline and sent < 8 << 20:
                try:
                    sent += raw.send(call * 100)
                except BlockingIOError:
                    time.sleep(0.01)
            # The server stopped reading: a socket's buffers and some calls are all that it took.
            assert sent < 4 << 20
            with connected(path) as connection:
                assert connection.call("org.example.Test.Double", {"number": 1}) == {"number": 2}

    await in_thread(use)


async def test_a_message_may_come_in_pieces(path: str) -> None:
    def use() -> bytes:
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(20)
            raw.connect(path)
            reading, writing = os.pipe()
            os.write(writing, b"whole")
            message = b'{"method":"org.example.Test.Read","parameters":{"file":0}}\0'
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reading]))]
            raw.sendmsg([message[:1]], rights)
            for each in message[1:]:
                raw.send(bytes((each,)))
            os.close(reading)
            os.close(writing)
            return raw.recv(1000)

    assert json.loads((await in_thread(use)).rstrip(b"\0")) == {"parameters": {"text": "whole"}}


def called(method: str, **more: object) -> bytes:
    """A call of a method of ours, as it stands on the wire."""
    return wire.encoded({"method": f"org.example.Test.{method}", **more})


def raw_socket(path: str) -> socket.socket:
    raw = socket.socket(socket.AF_UNIX)
    raw.settimeout(20)
    raw.connect(path)
    return raw


def raw_replies(raw: socket.socket, count: int) -> list[Any]:
    """So many replies, or those until the server hangs up."""
    data = b""
    while data.count(b"\0") < count and (piece := raw.recv(1 << 16)):
        data += piece
    return [json.loads(each) for each in data.split(b"\0")[:-1]]


@pytest.mark.parametrize("size", [0, 20_000])
async def test_descriptors_are_those_of_the_call_that_they_came_with(path: str, size: int) -> None:
    """The kernel gives what was sent before, without descriptors, together with the first bytes of what has some."""
    before = len(os.listdir("/proc/self/fd"))
    with raw_socket(path) as raw:
        # All of it is there before the server reads; with a timeout, sends would wait for room that they don't need.
        raw.settimeout(None)
        for text in (b"one", b"two"):
            raw.sendall(called("Double", parameters={"number": 1}, passed_over="x" * size))
            reading, writing = os.pipe()
            os.write(writing, text)
            os.close(writing)
            data = called("Read", parameters={"file": 0}, passed_over="x" * size)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reading]))]
            raw.sendall(data[raw.sendmsg([data], rights) :])
            os.close(reading)
        raw.settimeout(20)
        replies = await in_thread(raw_replies, raw, 4)
    assert [each.get("parameters") for each in replies] == [
        {"number": 2},
        {"text": "one"},
        {"number": 2},
        {"text": "two"},
    ]
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_calls_that_want_no_reply_are_answered_though_their_client_has_hung_up(
    path: str, service: Service
) -> None:
    for _ in range(20):
        with raw_socket(path) as raw:
            for _ in range(3):
                raw.sendall(called("Mark", oneway=True))
    await until(lambda: service.marks == 60)


async def test_more_calls_than_are_read_ahead_are_answered_though_their_client_has_hung_up(
    path: str, service: Service
) -> None:
    """Also where replies, which nobody will read, are between them."""
    with raw_socket(path) as raw:
        raw.sendall(called("Double", parameters={"number": 1}) + 100 * called("Mark", oneway=True))
    await until(lambda: service.marks == 100)
    assert service.went == 0


async def test_whoever_wants_no_reply_is_sent_none(path: str) -> None:
    def use() -> list[Any]:
        with raw_socket(path) as raw:
            raw.sendall(called("Count", parameters={"to": 3}, oneway=True, more=True))
            raw.sendall(called("Double", parameters={"number": 2}, oneway=True))
            raw.sendall(called("Double", parameters={"number": 4}))
            return raw_replies(raw, 1)

    assert await in_thread(use) == [{"parameters": {"number": 8}}]


async def test_what_follows_what_is_no_call_is_passed_over(
    path: str, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    def use() -> list[Any]:
        with raw_socket(path) as raw:
            raw.sendall(b"\0" * 100 + called("Mark", oneway=True))
            return raw_replies(raw, 1)

    assert await in_thread(use) == []
    assert service.marks == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(
    ("more", "reply"),
    [
        ({}, {"parameters": {}}),
        ({"parameters": None, "more": None, "oneway": None, "upgrade": None}, {"parameters": {}}),
        ({"parameters": []}, {"error": wire.INVALID_PARAMETER}),
    ],
)
async def test_what_is_null_is_not_there(path: str, more: dict[str, object], reply: dict[str, object]) -> None:
    def use() -> list[Any]:
        with raw_socket(path) as raw:
            raw.sendall(called("Mark", **more))
            return raw_replies(raw, 1)

    (got,) = await in_thread(use)
    assert {key: got[key] for key in reply} == reply


async def test_deep_parameters_are_no_internal_error(path: str, caplog: pytest.LogCaptureFixture) -> None:
    def use() -> list[Any]:
        with raw_socket(path) as raw:
            deep = b"[" * 200_000 + b"]" * 200_000
            raw.sendall(b'{"method":"org.example.Test.Mark","parameters":' + deep + b"}\0")
            return raw_replies(raw, 1)

    assert await in_thread(use) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("kind", ["CommandFailedError", "UsageError", "OfALaterVersion"])
def test_what_an_error_leaves_empty_may_be_null(kind: str) -> None:
    told = {"kind": kind, "message": "so it is", "hint": None, "said_by": None, "returncode": None, "output": None}
    error = wire.error_of(wire.FAILED, told, "the service")
    assert (error.message, error.hint, error.said_by) == ("so it is", "", "")
    assert type(error) is getattr(errors, kind, errors.NixletError)
    if isinstance(error, errors.CommandFailedError):
        assert (error.returncode, error.output) == (1, "")


@pytest.mark.parametrize(
    "value",
    [
        "".join(map(chr, (*range(0x300), 0x2028, 0x1F980, 0x10FFFF))),
        'a "quoted" C:\\path\n',
        {"": None, "list": [1, -2, 0, True, False], "tuple": ("a", ()), "deep": {"er": {}}},
        signal.SIGTERM,
    ],
)
def test_json_is_written_as_others_read_it(value: object) -> None:
    data = wire.encoded({"method": "x", "parameters": value})
    assert data.count(b"\0") == 1
    assert json.loads(data[:-1]) == json.loads(json.dumps({"method": "x", "parameters": value}))


def test_what_is_no_json_is_not_sent() -> None:
    with pytest.raises(TypeError, match="float"):
        wire.encoded({"parameters": 1.5})


async def test_a_text_that_is_no_utf8_is_refused_before_it_is_sent() -> None:
    with pytest.raises(errors.InvalidArgumentError, match="is not UTF-8"):
        wire.encoded({"parameters": {"name": os.fsdecode(b"\xff")}})


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(errors.UnavailableError, match="the service can't be reached: No such file"):
        connected(str(tmp_path / "none"))
