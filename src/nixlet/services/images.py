"""The CRI image service: ``nix:0`` references are pulled from the store, everything else is containerd's business.

Calls are looked at as bytes. Those that don't concern a ``nix:0`` reference go to containerd and back unchanged, as do methods that
nixlet has never heard of.
"""

from nixlet import errors
from nixlet.containerd import cri
from nixlet.images import pulls, reference
from nixlet.rpc import server
from nixlet.rpc.gen import cri_pb2 as pb
from nixlet.services import relay

#: The services that are handed on; v1alpha2 is what kubelets before 1.26 speak.
_PREFIXES = ("/runtime.v1.ImageService/", "/runtime.v1alpha2.ImageService/")


class ImageService:
    """Answers what no other service of the socket does."""

    def __init__(self, handing_on: relay.Relay, puller: pulls.Puller, images: cri.ImageClient) -> None:
        self._relay = handing_on
        self._puller = puller
        self._images = images
        self._handlers = {"PullImage": self._pull, "ImageStatus": self._status, "RemoveImage": self._remove}

    async def answer(self, path: str, stream: "server.Stream[bytes, bytes]") -> None:
        """Answer a call; for use as a server's fallback."""
        if not path.startswith(_PREFIXES):
            raise errors.UnimplementedError(f"unknown method {path}")
        request = await server.request(stream)
        handle = self._handlers.get(path.rpartition("/")[2])
        answer = await handle(request) if handle is not None else None
        if answer is None:
            await self._relay.answer(path, stream, request)
        else:
            await stream.send_message(answer)

    async def _pull(self, request: bytes) -> bytes | None:
        wanted = pb.PullImageRequest.FromString(request).image.image
        if not reference.is_archive(wanted):
            return None
        pulled = await self._puller.pull(wanted)
        return pb.PullImageResponse(image_ref=pulled.image_id).SerializeToString()

    async def _status(self, request: bytes) -> bytes | None:
        parsed = pb.ImageStatusRequest.FromString(request)
        if not reference.is_archive(parsed.image.image):
            return None
        image = await self._find(parsed.image.image)
        return pb.ImageStatusResponse(image=image).SerializeToString()

    async def _remove(self, request: bytes) -> bytes | None:
        wanted = pb.RemoveImageRequest.FromString(request).image.image
        if not reference.is_archive(wanted):
            return None
        image = await self._find(wanted)
        if image is not None:
            await self._images.remove(image.id)
        return pb.RemoveImageResponse().SerializeToString()

    async def _find(self, wanted: str) -> pb.Image | None:
        """An image by its ``nix:0`` reference: by our record of it, since CRI can't parse every path as a reference."""
        image_id = await self._puller.image_id(wanted)
        return None if image_id is None else await self._images.status(image_id)
