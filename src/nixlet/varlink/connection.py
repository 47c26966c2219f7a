"""One client of a Varlink server: its messages as they come, each with the descriptors that came beside it, and what it is sent."""

import array
import asyncio
import logging
import os
import socket
from collections.abc import Mapping, Sequence

import msgspec

from nixlet import errors
from nixlet.host import waits
from nixlet.varlink import wire

_CHUNK = 1 << 16

#: Messages that a client may be ahead; reading stops until they are taken.
_AHEAD = 16

_DESCRIPTOR = array.array("i").itemsize

_log = logging.getLogger("nixlet.varlink")

#: A message without its NUL, and its descriptors.
Received = tuple[bytes, list[int]]


class Connection:
    """A connected socket, which it owns.

    Attributes:
        gone: Set when nobody will read a reply any more: the client went or broke the protocol, or the server is ending.
        abandoned: Set when the server is ending.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Read from now on, until ``close``.

        Args:
            sock: Non-blocking.
        """
        self.gone = asyncio.Event()
        self.abandoned = asyncio.Event()
        self._socket = sock
        self._loop = asyncio.get_running_loop()
        self._splitter = wire.Splitter()
        self._begun: list[int] = []
        self._whole: asyncio.Queue[Received | None] = asyncio.Queue()
        self._reading = False
        self._at_end = False
        self._sending = asyncio.Lock()
        self._read_on()

    async def receive(self) -> Received | None:
        """The next message, whose descriptors the caller closes; None: no more come.

        What a client sent before it went is received all the same.
        """
        if not self._reading and not self._at_end and self._whole.qsize() < _AHEAD:
            self._read_on()
        return await self._whole.get()

    def refuse(self, why: object) -> None:
        """Hang up on a client that breaks the protocol, whatever else it sent."""
        _log.warning("a client is hung up on: %s", why)
        self._break_off()

    def abandon(self) -> None:
        """Take no more messages, those that came already included; whoever answers one learns that nobody listens."""
        self.abandoned.set()
        self._break_off()

    def close(self) -> None:
        """Close it."""
        self._end()
        self._drop()
        close_all(self._begun)
        self._socket.close()

    def _read_on(self) -> None:
        self._loop.add_reader(self._socket, self._read)
        self._reading = True

    def _read_no_more(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._socket)
            self._reading = False

    def _end(self) -> None:
        self.gone.set()
        self._read_no_more()
        if not self._at_end:
            self._at_end = True
            self._whole.put_nowait(None)

    def _break_off(self) -> None:
        self._end()
        self._drop()
        self._whole.put_nowait(None)

    def _drop(self) -> None:
        while not self._whole.empty():
            if (message := self._whole.get_nowait()) is not None:
                close_all(message[1])

    def _read(self) -> None:
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                _CHUNK, socket.CMSG_SPACE(wire.MAX_DESCRIPTORS * _DESCRIPTOR), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._end()
            return
        came = [
            descriptor
            for level, kind, rights in ancillary
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS
            for descriptor in array.array("i", rights[: len(rights) - len(rights) % _DESCRIPTOR])
        ]
        try:
            if not data or flags & socket.MSG_CTRUNC:
                self._end()
                return
            self._take(data, came)
        except errors.InvalidArgumentError as error:
            self.refuse(error)
        finally:
            close_all(came)

    def _take(self, data: bytes, came: list[int]) -> None:
        owner = self._begun
        for message in self._splitter.feed(data):
            owner, self._begun = self._begun, []
            self._whole.put_nowait((message, owner))
        # The kernel gives bytes that came with descriptors together with those that were sent before them, and none after them (unix(7),
        # SCM_RIGHTS): the descriptors belong to the last message of which something is here.
        if not self._splitter.empty:
            owner = self._begun
        if len(owner) + len(came) > wire.MAX_DESCRIPTORS:
            raise errors.InvalidArgumentError(f"a message brings more than {wire.MAX_DESCRIPTORS} descriptors")
        owner += came
        came.clear()
        if self._whole.qsize() >= _AHEAD:
            self._read_no_more()

    async def send(self, message: Mapping[str, object], descriptors: Sequence[int] = ()) -> None:
        """Send a message whole; where the client is gone, it goes nowhere.

        Args:
            message: The message.
            descriptors: Handed over with it; they stay the caller's as well.
        """
        data = memoryview(msgspec.json.encode(message) + b"\0")
        # With the first byte.
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        async with self._sending:
            while data and not self.gone.is_set():
                try:
                    data = data[self._socket.sendmsg([data], rights) :]
                    rights = []
                except (BlockingIOError, InterruptedError):
                    await self._writable()
                except OSError:
                    # What it sent before is still to be read.
                    self.gone.set()

    async def _writable(self) -> None:
        writable = asyncio.Event()
        self._loop.add_writer(self._socket, writable.set)
        try:
            await waits.first(writable.wait(), self.gone.wait())
        finally:
            self._loop.remove_writer(self._socket)


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that came with a message."""
    while descriptors:
        os.close(descriptors.pop())
