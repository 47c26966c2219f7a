"""The image service in front of the real containerd of each version: what it asks there for what it is asked."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from grpclib.const import Cardinality

from nixlet.containerd import cri, handlers, imagestore
from nixlet.host import unixsocket
from nixlet.images import closurecheck, loader, readiness, recorded, registrypulls
from nixlet.rpc import channel as channels
from nixlet.rpc import server
from nixlet.rpc.gen import cri_pb2 as pb
from nixlet.services import images, relay
from support import containerds, parts

IMAGE = "docker.io/library/asked:1"

_SERVICE = "/runtime.v1.ImageService"


class Asked:
    """An image service, and what it asked of its containerd since that was looked at last."""

    def __init__(self, channel: channels.Channel, seen: list[str], store: imagestore.ImageStore) -> None:
        self._channel = channel
        self._seen = seen
        self.store = store

    async def ask(self, method: str, request: bytes = b"") -> bytes:
        """The answer to a call."""
        self._seen.clear()
        path = f"{_SERVICE}/{method}"
        async with self._channel.request(path, Cardinality.UNARY_UNARY, bytes, bytes, timeout=20) as call:
            await call.send_message(request, end=True)
            message = await call.recv_message()
            assert message is not None
            return message

    async def status(self, name: str) -> pb.Image | None:
        """An image's status."""
        asked = pb.ImageStatusRequest(image=pb.ImageSpec(image=name)).SerializeToString()
        answer = pb.ImageStatusResponse.FromString(await self.ask("ImageStatus", asked))
        return answer.image if answer.HasField("image") else None

    @property
    def seen(self) -> list[str]:
        """The methods, without their packages."""
        return [path.rpartition(".")[2] for path in self._seen]


@pytest.fixture(params=parts.CONTAINERD_PARAMETERS)
async def asked(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Asked]:
    seen: list[str] = []
    async with containerds.with_cri(request.param, tmp_path, IMAGE) as channel:
        asking = channel.request

        def noted(name: str, *arguments: Any, **more: Any) -> Any:
            seen.append(name)
            return asking(name, *arguments, **more)

        channel.request = noted  # type: ignore[method-assign]  # to see what is asked
        store, shown = imagestore.ImageStore(channel, "containerd"), cri.ImageClient(channel, "containerd")
        check = closurecheck.ClosureCheck(containerds.SNAPSHOTTER, None)
        for_paths = images.ForPaths(
            registrypulls.RegistryPulls(store, check),
            readiness.Readiness(store, containerds.SNAPSHOTTER, check, loader.Loader(store, containerds.SNAPSHOTTER)),
            handlers.Handlers(cri.RuntimeClient(channel, "containerd"), containerds.SNAPSHOTTER),
        )
        service = images.ImageService(
            relay.Relay(channel, "containerd"),
            images.NoNix(containerds.SNAPSHOTTER),
            recorded.Recorded(store),
            shown,
            None,
            images.Listing(shown, store.untold_pins),
            for_paths=for_paths,
        )
        socket = str(tmp_path / "d" / "i.sock")
        async with (
            server.serve(unixsocket.listen(socket), [], fallback=service.answer),
            channels.connect(socket) as ours,
        ):
            made = Asked(ours, seen, store)
            # What it has to find out once.
            await made.ask("ListImages")
            yield made


async def _tells_pins(asked: Asked) -> bool:
    return await asked.store.release() >= (1, 7)


async def test_what_a_kubelet_asks_again_and_again_is_cheap(asked: Asked) -> None:
    """One question for what a kubelet asks at rest, but for containerd 1.6, which has to be asked for pins as well; two for a pod's image."""
    pins = [] if await _tells_pins(asked) else ["Images/List"]
    await asked.ask("ListImages")
    assert asked.seen == [*pins, "ImageService/ListImages"]
    await asked.ask("ImageFsInfo")
    assert asked.seen == ["ImageService/ImageFsInfo"]
    assert await asked.status("docker.io/library/absent:1") is None
    assert asked.seen == [*pins, "ImageService/ImageStatus"]
    # Whether it is of store paths isn't known yet.
    assert await asked.status(IMAGE) is not None
    assert asked.seen[: len(pins) + 2] == [*pins, "ImageService/ImageStatus", "Images/Get"]
    assert "Content/Read" in asked.seen
    for name in (IMAGE, "asked:1"):
        assert await asked.status(name) is not None
        assert asked.seen == [*pins, "ImageService/ImageStatus", "Images/Get"]


async def test_pins_are_told(asked: Asked) -> None:
    """containerd 1.6 keeps them to itself."""
    found = await asked.status(IMAGE)
    assert found is not None
    assert not found.pinned
    record = await asked.store.image(IMAGE)
    assert record is not None
    await asked.store.label_image(record, imagestore.PINNED)
    async with asyncio.timeout(20):
        while not ((found := await asked.status(IMAGE)) and found.pinned):
            await asyncio.sleep(0.02)
    (listed,) = pb.ListImagesResponse.FromString(await asked.ask("ListImages")).images
    assert listed.pinned
    assert listed.id == found.id


async def test_an_image_that_is_another_one_by_the_same_name_is_looked_at_again(asked: Asked) -> None:
    """As after an import by another client: of one configuration, and so of one ID, with other annotations."""
    assert await asked.status(IMAGE) is not None
    record = await asked.store.image(IMAGE)
    assert record is not None
    manifest = msgspec.json.decode(await asked.store.read_content(record.target.digest, 1 << 20))
    manifest["annotations"] = {"it.is": "another"}
    text = msgspec.json.encode(manifest)
    digest = f"sha256:{hashlib.sha256(text).hexdigest()}"

    async def whole() -> AsyncIterator[bytes]:
        yield text

    async with asked.store.leased() as store:
        await store.write_content(digest, len(text), whole, {})
        target = imagestore.Descriptor(record.target.media_type, digest, len(text))
        await store.put_image(IMAGE, target, {})
        # CRI hears of it in its own time, and shows the same as before.
        await asyncio.sleep(0.5)
        assert await asked.status(IMAGE) is not None
        assert "Content/Read" in asked.seen
