"""The relay in front of the real containerd of each version: what a client gets is what containerd says, byte for byte."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Cardinality, Status
from grpclib.exceptions import GRPCError

from nixlet.host import unixsocket
from nixlet.rpc import channel as channels
from nixlet.rpc import server, transport
from nixlet.rpc.gen import cri_pb2 as pb
from nixlet.services import relay
from support import containerds, parts

IMAGE = "docker.io/library/relayed:1"

_SERVICE = "/runtime.v1.ImageService"


@dataclasses.dataclass(frozen=True)
class Doors:
    """Both ways to one containerd, and what went through the relay."""

    direct: channels.Channel
    relayed: channels.Channel
    seen: list[str]


@pytest.fixture(params=parts.CONTAINERD_PARAMETERS)
async def doors(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Doors]:
    seen: list[str] = []
    async with containerds.with_cri(request.param, tmp_path, IMAGE) as direct:
        handing_on = relay.Relay(direct, "containerd")

        async def fallback(path: str, stream: "server.Stream[bytes, bytes]") -> None:
            seen.append(path)
            await handing_on.answer(path, stream, await server.request(stream))

        socket = str(tmp_path / "d" / "r.sock")
        async with (
            server.serve(unixsocket.listen(socket), [], fallback=fallback),
            channels.connect(socket) as relayed,
        ):
            yield Doors(direct, relayed, seen)


async def ask(channel: channels.Channel, path: str, request: bytes = b"") -> bytes:
    """The bytes of a method's one answer."""
    async with channel.request(path, Cardinality.UNARY_UNARY, bytes, bytes, timeout=20) as call:
        await call.send_message(request, end=True)
        message = await call.recv_message()
        assert message is not None
        return message


async def refusal(channel: channels.Channel, path: str, request: bytes = b"") -> tuple[Status, str | None, Any]:
    with pytest.raises(GRPCError) as caught:
        await ask(channel, path, request)
    return caught.value.status, caught.value.message, caught.value.details


async def listed(channel: channels.Channel) -> bytes:
    """The answer to ListImages as soon as it has the image: CRI hears of it by an event."""
    async with asyncio.timeout(20):
        while IMAGE.encode() not in (answer := await ask(channel, f"{_SERVICE}/ListImages")):
            await asyncio.sleep(0.05)
        return answer


def without_times(answer: bytes) -> bytes:
    """An answer to ImageFsInfo without the moment when it was asked."""
    parsed = pb.ImageFsInfoResponse.FromString(answer)
    assert len(parsed.image_filesystems) == 1
    assert parsed.SerializeToString() == answer
    for usage in (*parsed.image_filesystems, *parsed.container_filesystems):
        usage.timestamp = 0
    return parsed.SerializeToString()


async def test_answers_are_the_same_bytes(doors: Doors) -> None:
    images = await listed(doors.direct)
    assert await ask(doors.relayed, f"{_SERVICE}/ListImages") == images
    parsed = pb.ListImagesResponse.FromString(images)
    assert [list(image.repo_tags) for image in parsed.images] == [[IMAGE]]

    for verbose in (False, True):
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=IMAGE), verbose=verbose).SerializeToString()
        theirs = await ask(doors.direct, f"{_SERVICE}/ImageStatus", request)
        assert await ask(doors.relayed, f"{_SERVICE}/ImageStatus", request) == theirs
        status = pb.ImageStatusResponse.FromString(theirs)
        assert status.image.repo_tags == [IMAGE]
        assert bool(status.info) is verbose

    theirs, ours = [await ask(channel, f"{_SERVICE}/ImageFsInfo") for channel in (doors.direct, doors.relayed)]
    assert without_times(ours) == without_times(theirs)
    methods = ["ListImages", "ImageStatus", "ImageStatus", "ImageFsInfo"]
    assert doors.seen == [f"{_SERVICE}/{method}" for method in methods]


async def test_errors_are_containerds_own(doors: Doors, caplog: pytest.LogCaptureFixture) -> None:
    request = pb.PullImageRequest(image=pb.ImageSpec(image="NOT A REFERENCE")).SerializeToString()
    theirs = await refusal(doors.direct, f"{_SERVICE}/PullImage", request)
    assert theirs[0] is not Status.OK
    assert "NOT A REFERENCE" in (theirs[1] or "")
    assert await refusal(doors.relayed, f"{_SERVICE}/PullImage", request) == theirs
    assert not [record for record in caplog.records if record.name.startswith("nixlet")]


@pytest.mark.parametrize("path", [f"{_SERVICE}/NoSuchMethod", "/runtime.v1alpha9.ImageService/ListImages"])
async def test_unknown_methods_are_refused_in_containerds_words(doors: Doors, path: str) -> None:
    theirs = await refusal(doors.direct, path)
    assert theirs[0] is Status.UNIMPLEMENTED
    assert "unknown" in (theirs[1] or "")
    assert await refusal(doors.relayed, path) == theirs
    assert doors.seen == [path]


async def test_a_message_beyond_the_limit_does_not_reach_containerd(
    doors: Doors, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Our own client would not send it; the limit at hand is the server's.
    monkeypatch.setattr(transport.RawCodec, "encode", lambda _self, message, _type: message)
    status, message, _ = await refusal(doors.relayed, f"{_SERVICE}/ListImages", bytes(17 << 20))
    assert status is Status.RESOURCE_EXHAUSTED
    assert str(17 << 20) in (message or "")
    assert doors.seen == [f"{_SERVICE}/ListImages"]
    # The connection outlives the refusal, and what was sent in vain doesn't use up its window.
    await ask(doors.relayed, f"{_SERVICE}/ListImages")


async def test_containerd_going_away_is_told(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as backend:
        direct = await backend.enter_async_context(containerds.with_cri(parts.CONTAINERDS[0], tmp_path, IMAGE))
        handing_on = relay.Relay(direct, f"containerd at {tmp_path}/c.sock")

        async def fallback(path: str, stream: "server.Stream[bytes, bytes]") -> None:
            await handing_on.answer(path, stream, await server.request(stream))

        socket = str(tmp_path / "d" / "r.sock")
        async with (
            server.serve(unixsocket.listen(socket), [], fallback=fallback),
            channels.connect(socket) as relayed,
        ):
            # A stream that containerd never ends by itself, and on which nothing happens here.
            events = asyncio.create_task(refusal(relayed, "/containerd.services.events.v1.Events/Subscribe"))
            await ask(relayed, f"{_SERVICE}/ListImages")
            assert not events.done()
            await backend.aclose()
            during = await asyncio.wait_for(events, 10)
            afterwards = await refusal(relayed, f"{_SERVICE}/ListImages")
    for status, message, _ in (during, afterwards):
        assert status is Status.UNAVAILABLE
        assert f"containerd at {tmp_path}/c.sock" in (message or "")
