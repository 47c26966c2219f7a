"""A Varlink server on a unix socket, whose peers are its own user and root, and who may hand descriptors over."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec

import nixlet
from nixlet import errors
from nixlet.encoding import unreadable
from nixlet.host import files, waits
from nixlet.varlink import connection, wire

#: Seconds that calls get to end when the server stops, after they were told.
_GRACE = 5.0

#: Seconds without new connections after one could not be taken, as when no descriptor is free.
_PAUSE = 0.2

P = TypeVar("P")
T = TypeVar("T")

_log = logging.getLogger("nixlet.varlink")


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters."""


class Call(Generic[P]):
    """A call that is being answered.

    Attributes:
        parameters: What it asks for.
        more: Whether the client takes several replies.
        gone: Set when nobody will read a reply any more: the client went, or the server is ending. Nothing is cancelled by that.
    """

    def __init__(
        self, parameters: P, *, more: bool, descriptors: Sequence[int], gone: asyncio.Event, reply: "_Reply"
    ) -> None:
        self.parameters = parameters
        self.more = more
        self.gone = gone
        self._descriptors = descriptors
        self._reply = reply

    def descriptor(self, index: int) -> int:
        """A descriptor that came with the call; it is closed when the call has been answered, so who keeps it duplicates it.

        Raises:
            InvalidArgumentError: None of that index came.
        """
        if not 0 <= index < len(self._descriptors):
            raise errors.InvalidArgumentError(f"the call names descriptor {index} and brought {len(self._descriptors)}")
        return self._descriptors[index]

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Do something until it has ended, or until nobody will read a reply any more: then it is cancelled, and None."""
        try:
            return await waits.unless(self.gone, work)
        except waits.Interrupted:
            return None

    async def reply(self, parameters: object, descriptors: Sequence[int] = ()) -> None:
        """Send one of several replies; what the handler returns is the last. Where the client is gone, it goes nowhere.

        Only for methods that are declared to have several, and where ``more`` says so.

        Args:
            parameters: What it says.
            descriptors: Handed over with it; they stay the caller's as well.
        """
        assert self.more
        await self._reply({"parameters": parameters, "continues": True}, descriptors)


#: Answers a call with the parameters of its only or last reply: a struct, a mapping, or None for none.
Handler = Callable[[Call[Any]], Awaitable[object]]

_Reply = Callable[[Mapping[str, object], Sequence[int]], Awaitable[None]]


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """A method.

    Attributes:
        parameters: The type of its parameters, which msgspec checks.
        handler: What answers it.
        several: Whether it has several replies; or whether it has with given parameters. A call that takes a single reply is refused
            then, before anything is done for it.
    """

    parameters: type[Any]
    handler: Handler
    several: bool | Callable[[Any], bool] = False

    def has_several(self, parameters: object) -> bool:
        """Whether it has several replies with these parameters."""
        return self.several(parameters) if callable(self.several) else self.several


@dataclasses.dataclass(frozen=True, slots=True)
class Interface:
    """An interface: its name, its description in Varlink's language, its methods by their names without the interface's."""

    name: str
    description: str
    methods: Mapping[str, Method]


class _Message(msgspec.Struct, frozen=True):
    """A call on the wire (https://varlink.org/Method-Call); ``upgrade`` is not offered."""

    method: str
    parameters: msgspec.Raw = msgspec.Raw(b"null")
    more: bool | None = None
    oneway: bool | None = None


class _InterfaceNamed(msgspec.Struct, frozen=True):
    interface: str


_SERVICE = """# The interface of every Varlink service (https://varlink.org/Service).
interface org.varlink.service

method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
"""


class _ProtocolError(Exception):
    """A reply with one of Varlink's own errors."""

    def __init__(self, name: str, **parameters: str) -> None:
        super().__init__(name)
        self.reply = {"error": name, "parameters": parameters}


class _Service:
    """What a server serves, ``org.varlink.service`` included."""

    def __init__(self, interfaces: Sequence[Interface]) -> None:
        own = Interface(
            "org.varlink.service",
            _SERVICE,
            {
                "GetInfo": Method(Nothing, self._info),
                "GetInterfaceDescription": Method(_InterfaceNamed, self._describe),
            },
        )
        self._interfaces = {each.name: each for each in (own, *interfaces)}

    async def _info(self, _: Call[Nothing]) -> Mapping[str, object]:
        return {
            "vendor": "nixlet",
            "product": "nixlet",
            "version": nixlet.__version__,
            "url": "",
            "interfaces": list(self._interfaces),
        }

    async def _describe(self, call: Call[_InterfaceNamed]) -> Mapping[str, object]:
        found = self._interfaces.get(call.parameters.interface)
        if found is None:
            raise _ProtocolError(wire.INTERFACE_NOT_FOUND, interface=call.parameters.interface)
        return {"description": found.description}

    def method(self, name: str) -> Method:
        interface, _, method = name.rpartition(".")
        found = self._interfaces.get(interface)
        if found is None:
            raise _ProtocolError(wire.INTERFACE_NOT_FOUND, interface=interface)
        if method not in found.methods:
            raise _ProtocolError(wire.METHOD_NOT_FOUND, method=method)
        return found.methods[method]


class _Client:
    """Answers one client's calls, one after the other, until it goes or breaks the protocol."""

    def __init__(self, connected: connection.Connection, service: _Service) -> None:
        self._connection = connected
        self._service = service

    async def serve(self) -> None:
        try:
            while (received := await self._connection.receive()) is not None:
                raw, descriptors = received
                try:
                    await self._answer(raw, descriptors)
                finally:
                    connection.close_all(descriptors)
        finally:
            self._connection.close()

    def abandon(self) -> None:
        """Have it end; whoever answers a call learns that nobody listens."""
        self._connection.abandon()

    async def _answer(self, raw: bytes, descriptors: Sequence[int]) -> None:
        try:
            message = msgspec.json.decode(raw, type=_Message)
        except unreadable.JSON as error:
            self._connection.refuse(f"its message is not well-formed: {error}")
            return
        if self._connection.gone.is_set() and not message.oneway:
            # It has not started, and nobody would learn what became of it.
            return
        reply = await self._replied(message, descriptors)
        if not message.oneway:
            await self._connection.send(reply)

    async def _replied(self, message: _Message, descriptors: Sequence[int]) -> Mapping[str, object]:
        try:
            method = self._service.method(message.method)
            try:
                # What is null is what is not there.
                given = msgspec.json.decode(message.parameters, type=dict[str, Any] | None) or {}
                there = {name: value for name, value in given.items() if value is not None}
                parameters = msgspec.convert(there, type=method.parameters)
            except unreadable.JSON as error:
                raise _ProtocolError(wire.INVALID_PARAMETER, parameter=str(error)) from error
            more = bool(message.more and not message.oneway)
            if method.has_several(parameters) and not more:
                raise _ProtocolError(wire.EXPECTED_MORE)
            call = Call(
                parameters,
                more=more,
                descriptors=descriptors,
                # Who wants no reply may go at once.
                gone=self._connection.abandoned if message.oneway else self._connection.gone,
                reply=self._connection.send,
            )
            result = await method.handler(call)
        except _ProtocolError as error:
            return error.reply
        except errors.NixletError as error:
            return {"error": wire.FAILED, "parameters": wire.parameters_of(error)}
        except Exception as error:  # noqa: BLE001 (a client waits for an answer, and the log has it all)
            _log.exception("%s failed", message.method)
            told = files.exhausted(error) if isinstance(error, OSError) else None
            told = told or errors.NixletError(
                f"the node has an internal error: {type(error).__name__}", hint="look into its log, and report it"
            )
            return {"error": wire.FAILED, "parameters": wire.parameters_of(told)}
        return {"parameters": {} if result is None else result}


class _Server:
    def __init__(self, sock: socket.socket, service: _Service) -> None:
        self._socket = sock
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._serving: dict[asyncio.Task[None], _Client] = {}
        self._pause: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # It would be asked for again at once.
            _log.warning("no connection can be taken for a moment: %s", error)
            self._loop.remove_reader(self._socket)
            self._pause = self._loop.call_later(_PAUSE, self.start)
            return
        sock.setblocking(False)
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in {0, os.geteuid()}:
            sock.close()
            return
        client = _Client(connection.Connection(sock), self._service)
        task = asyncio.create_task(client.serve(), name="varlink client")
        self._serving[task] = client
        task.add_done_callback(self._served)

    def _served(self, task: "asyncio.Task[None]") -> None:
        del self._serving[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a connection failed", exc_info=error)

    async def stop(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for client in self._serving.values():
            client.abandon()
        if self._serving:
            await asyncio.wait(set(self._serving), timeout=_GRACE)
        left = set(self._serving)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


@contextlib.asynccontextmanager
async def serve(sock: socket.socket, interfaces: Sequence[Interface]) -> AsyncIterator[None]:
    """Serve on a listening unix socket for the time of the context; calls that run then are told, and get a few seconds.

    Args:
        sock: The socket, listening; it is closed at the end.
        interfaces: What is served, besides ``org.varlink.service``.
    """
    server = _Server(sock, _Service(interfaces))
    server.start()
    try:
        yield
    finally:
        await server.stop()
