"""HTTP/2's frames (RFC 9113, sections 4, 6 and 7) as bytes, as far as a server of gRPC has to do with them."""

import struct
from typing import Final

#: What a client begins with.
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

#: The head of a frame: its length in two parts (8 and 16 bits), type, flags, stream.
HEAD: Final = struct.Struct(">BHBBL")

#: No frame may carry more (bytes); the least that the RFC allows, and what every peer begins with.
MAX_FRAME: Final = 16384

#: A flow-control window at the beginning, and the largest one (bytes).
DEFAULT_WINDOW: Final = 65535
MAX_WINDOW: Final = 2**31 - 1

#: The last stream that there can be.
MAX_STREAM: Final = 2**31 - 1

# Types of frames.
DATA: Final = 0x0
HEADERS: Final = 0x1
PRIORITY: Final = 0x2
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PUSH_PROMISE: Final = 0x5
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9

# Flags; some types share a number.
ACK: Final = 0x1
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

# Settings.
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6
ENABLE_PUSH: Final = 0x2

# Reasons for ending a stream or a connection.
NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
INTERNAL_ERROR: Final = 0x2
FLOW_CONTROL_ERROR: Final = 0x3
STREAM_CLOSED: Final = 0x5
FRAME_SIZE_ERROR: Final = 0x6
REFUSED_STREAM: Final = 0x7
COMPRESSION_ERROR: Final = 0x9
ENHANCE_YOUR_CALM: Final = 0xB

_SETTING = struct.Struct(">HL")
_NUMBER = struct.Struct(">L")
_TWO_NUMBERS = struct.Struct(">LL")

#: What a gRPC message begins with on the wire: whether it is compressed, and its length.
MESSAGE: Final = struct.Struct(">BL")

_HEAD_AND_MESSAGE = struct.Struct(">BHBBLBL")


class ConnectionFault(Exception):
    """The peer broke a rule in a way that ends the connection."""

    def __init__(self, code: int, reason: str) -> None:
        """A fault.

        Args:
            code: What the RFC calls it.
            reason: In words, for the peer.
        """
        super().__init__(reason)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame."""
    length = len(payload)
    return HEAD.pack(length >> 16, length & 0xFFFF, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*each) for each in values.items()))


def parsed_settings(payload: bytes) -> dict[int, int]:
    """What a SETTINGS frame says; of a setting that comes twice the last.

    Raises:
        ConnectionFault: It is none.
    """
    if len(payload) % _SETTING.size:
        raise ConnectionFault(FRAME_SIZE_ERROR, "SETTINGS of an odd length")
    values = dict(_SETTING.iter_unpack(payload))
    if values.get(ENABLE_PUSH, 0) > 1:
        raise ConnectionFault(PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1")
    if values.get(INITIAL_WINDOW_SIZE, 0) > MAX_WINDOW:
        raise ConnectionFault(FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is too large")
    if not MAX_FRAME <= values.get(MAX_FRAME_SIZE, MAX_FRAME) < 1 << 24:
        raise ConnectionFault(PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range")
    return values


def number_in(payload: bytes) -> int:
    """What a WINDOW_UPDATE or RST_STREAM frame says.

    Raises:
        ConnectionFault: It has another length.
    """
    if len(payload) != _NUMBER.size:
        raise ConnectionFault(FRAME_SIZE_ERROR, "a frame of the wrong length")
    number: int = _NUMBER.unpack(payload)[0]
    return number


def window_update(stream: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream, _NUMBER.pack(increment))


def reset(stream: int, code: int) -> bytes:
    """A RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream, _NUMBER.pack(code))


def go_away(last: int, code: int = NO_ERROR, reason: str = "") -> bytes:
    """A GOAWAY frame: streams after ``last`` are not answered."""
    return frame(GOAWAY, 0, 0, _TWO_NUMBERS.pack(last, code) + reason.encode())


def unpadded(flags: int, payload: bytes) -> bytes:
    """The content of a DATA or HEADERS frame that may be padded.

    Raises:
        ConnectionFault: There is more padding than frame.
    """
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ConnectionFault(PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]


def header_frames(stream: int, block: bytes, *, end: bool, largest: int = MAX_FRAME) -> bytes:
    """A block of header fields as one HEADERS frame, and CONTINUATION frames where it needs them."""
    flags = END_STREAM if end else 0
    if len(block) <= largest:
        return frame(HEADERS, flags | END_HEADERS, stream, block)
    made = [frame(HEADERS, flags, stream, block[:largest])]
    for begin in range(largest, len(block), largest):
        piece = block[begin : begin + largest]
        made.append(frame(CONTINUATION, END_HEADERS if begin + largest >= len(block) else 0, stream, piece))
    return b"".join(made)


def message_in_one_frame(stream: int, message: bytes) -> bytes:
    """A gRPC message, uncompressed, as one DATA frame; for those that fit into one."""
    length = len(message) + MESSAGE.size
    return _HEAD_AND_MESSAGE.pack(length >> 16, length & 0xFFFF, DATA, 0, stream, 0, len(message)) + message
