"""Header fields of gRPC calls over HTTP/2: those of requests are read, those of answers written.

The forms are those of gRPC's "gRPC over HTTP2", on RFC 9113 (section 8) and RFC 7541. What is written uses no dynamic table: a field
is always the same bytes, whatever was sent before on the connection.
"""

import base64
import binascii
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final
from urllib.parse import quote

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from multidict import MultiDict

#: Names to values; those of names that end in "-bin" are bytes.
Metadata = MultiDict[str | bytes]

#: What may be given as such.
MetadataLike = Mapping[str, str | bytes] | Collection[tuple[str, str | bytes]]

Fields = Iterable[tuple[bytes, bytes]]

_PSEUDO = {b":method", b":scheme", b":path", b":authority"}

#: Fields that belong to a connection of HTTP/1 (RFC 9113, 8.2.2).
_OF_CONNECTIONS = {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}

#: What is no metadata, beside all that begins with "grpc-".
_RESERVED = {"te", "content-type", "user-agent"}

_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(rb"(?:[^\0\r\n\t ](?:[^\0\r\n]*[^\0\r\n\t ])?)?")
_METADATA_NAME = re.compile(r"[0-9a-z_.\-]+")
_METADATA_VALUE = re.compile(r"[ -~]*")

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}

#: What a status's text is written in as it is; all else as %XX.
_UNQUOTED = "".join(chr(number) for number in range(0x20, 0x7F) if chr(number) != "%")


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is no call that can be answered: a status of HTTP, one of gRPC, and the reason."""

    http: int
    status: Status
    message: str


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """What a block of a client's header fields says.

    Attributes:
        fields: All of them.
        begins_call: It has pseudo-header fields, as the head of a request has and its trailers don't.
        malformed: What is wrong with it, as HTTP; empty: nothing.
        refusal: What is wrong with it, as gRPC.
        path: The method.
        timeout: Seconds until the deadline; None: there is none.
    """

    fields: tuple[tuple[bytes, bytes], ...]
    begins_call: bool
    malformed: str = ""
    refusal: Refusal | None = None
    path: str = ""
    timeout: float | None = None

    def metadata(self) -> Metadata:
        """The fields that are the caller's own.

        Raises:
            GRPCError: A binary one isn't in base64.
        """
        found = Metadata()
        for raw_name, value in self.fields:
            name = raw_name.decode("latin-1")
            if name.startswith((":", "grpc-")) or name in _RESERVED:
                continue
            if not name.endswith("-bin"):
                found.add(name, value.decode("latin-1"))
                continue
            for part in value.split(b","):
                try:
                    found.add(name, base64.b64decode(part + b"=" * (-len(part) % 4), validate=True))
                except binascii.Error as error:
                    raise GRPCError(Status.INTERNAL, f"the metadata {name} is not in base64") from error
        return found


def read(fields: Fields) -> Head:
    """What a decoded block says."""
    kept = tuple(fields)
    begins = any(name.startswith(b":") for name, _ in kept)
    values = dict(kept)
    malformed = _malformed(kept) or (_malformed_request(kept, values) if begins else "")
    if malformed or not begins:
        return Head(kept, begins, malformed)
    refusal, timeout = _refusal(values), None
    given = [value for name, value in kept if name == b"grpc-timeout"]
    if given and refusal is None:
        parsed = [_TIMEOUT.fullmatch(value) for value in given]
        if all(parsed):
            timeout = min(int(each[1]) * _UNITS[each[2]] for each in parsed if each)
        else:
            refusal = Refusal(200, Status.UNKNOWN, "Invalid grpc-timeout header")
    return Head(kept, begins, "", refusal, values[b":path"].decode("latin-1"), timeout)


def _malformed(fields: tuple[tuple[bytes, bytes], ...]) -> str:
    regular = False
    for name, value in fields:
        if name.startswith(b":"):
            if regular:
                return "a pseudo-header field after others"
            if name not in _PSEUDO:
                return "an unknown pseudo-header field"
        else:
            regular = True
            if not _NAME.fullmatch(name):
                return "a field's name that is none"
            if name in _OF_CONNECTIONS:
                return "a field of HTTP/1's connections"
        if not _VALUE.fullmatch(value):
            return "a field's value that is none"
    return ""


def _malformed_request(fields: tuple[tuple[bytes, bytes], ...], values: dict[bytes, bytes]) -> str:
    pseudo = [name for name, _ in fields if name.startswith(b":")]
    if len(pseudo) != len(set(pseudo)):
        return "a pseudo-header field twice"
    if not {b":method", b":scheme", b":path"} <= set(pseudo) or not values[b":path"]:
        return "a pseudo-header field too few"
    return ""


def _refusal(values: dict[bytes, bytes]) -> Refusal | None:
    if values[b":method"] != b"POST":
        return Refusal(405, Status.UNKNOWN, "Only POST is a call")
    content_type = values.get(b"content-type")
    if content_type is None:
        return Refusal(415, Status.UNKNOWN, "Missing content-type header")
    if content_type not in {b"application/grpc", b"application/grpc+proto"}:
        return Refusal(415, Status.UNKNOWN, "Unacceptable content-type header")
    if values.get(b"te") != b"trailers":
        return Refusal(400, Status.UNKNOWN, 'Required "te: trailers" header is missing')
    return None


def _length(number: int) -> bytes:
    """An integer with a prefix of 7 bits (RFC 7541, 5.1); the eighth says that no Huffman code is used."""
    if number < 127:
        return bytes((number,))
    written, number = bytearray((127,)), number - 127
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)


def _field(name: bytes, value: bytes) -> bytes:
    """A literal field that enters no table (RFC 7541, 6.2.2)."""
    return b"\0" + _length(len(name)) + name + _length(len(value)) + value


#: What an answer begins with: the dynamic table has no room (RFC 7541, 6.3; said each time, since each time it is true), the content type.
#: ":status: 200" stands between the two (entry 8 of the static table).
_NO_TABLE: Final = b"\x20"
_STATUS_200: Final = b"\x88"
_CONTENT_TYPE: Final = _field(b"content-type", b"application/grpc+proto")

#: The head of an answer without metadata, and the trailers of one that is well.
PLAIN: Final = _NO_TABLE + _STATUS_200 + _CONTENT_TYPE
WELL: Final = _field(b"grpc-status", b"0")

#: Stands beside UNIMPLEMENTED, which compressed messages are answered with: only messages as they are.
_UNCOMPRESSED: Final = _field(b"grpc-accept-encoding", b"identity")


def initial(metadata: MetadataLike | None) -> bytes:
    """The head of an answer.

    Raises:
        ValueError: A name or value isn't one that gRPC has.
    """
    return PLAIN + _written(metadata) if metadata else PLAIN


def trailers(
    status: Status, message: str | None = None, details: bytes | None = None, metadata: MetadataLike | None = None
) -> bytes:
    """The end of an answer.

    Args:
        status: How the call went.
        message: What is to be said of that.
        details: The same as an encoded google.rpc.Status.
        metadata: The server's own.

    Raises:
        ValueError: A name or value of the metadata isn't one that gRPC has.
    """
    if status is Status.OK and not (message or details or metadata):
        return WELL
    block = _field(b"grpc-status", str(status.value).encode())
    if message is not None:
        # What the system says may have parts that are no text.
        text = quote(message.encode("utf-8", "backslashreplace"), safe=_UNQUOTED)
        block += _field(b"grpc-message", text.encode())
    if details is not None:
        block += _field(b"grpc-status-details-bin", _in_base64(details))
    if status is Status.UNIMPLEMENTED:
        block += _UNCOMPRESSED
    return block + _written(metadata)


def refused(refusal: Refusal) -> bytes:
    """The whole answer to what is no call."""
    http = _STATUS_200 if refusal.http == 200 else b"\x08\x03" + str(refusal.http).encode()
    return _NO_TABLE + http + _CONTENT_TYPE + trailers(refusal.status, refusal.message)


def _written(metadata: MetadataLike | None) -> bytes:
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata or ()
    return b"".join(_field(name.encode(), _value(name, value)) for name, value in pairs)


def _value(name: str, value: str | bytes) -> bytes:
    if not _METADATA_NAME.fullmatch(name) or name.startswith("grpc-") or name in _RESERVED:
        msg = f"not a name of metadata: {name!r}"
        raise ValueError(msg)
    if name.endswith("-bin") and isinstance(value, bytes):
        return _in_base64(value)
    if name.endswith("-bin") or not isinstance(value, str) or not _METADATA_VALUE.fullmatch(value):
        msg = f"not a value of metadata {name}: {value!r}"
        raise ValueError(msg)
    return value.encode()


def _in_base64(value: bytes) -> bytes:
    return base64.b64encode(value).rstrip(b"=")
