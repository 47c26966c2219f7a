"""The CRI image service: ``nix:0`` references are pulled from the store, everything else is containerd's business.

Calls are looked at as bytes. Those that don't concern a ``nix:0`` reference go to containerd and back unchanged, as do methods that
nixlet has never heard of. What containerd pulled is looked at before its answer goes on, and the pull fails if containers would see the
wrong closure.
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from grpclib.const import Status

from nixlet import errors
from nixlet.containerd import cri
from nixlet.images import readiness, recorded, reference, registrypulls
from nixlet.rpc import server
from nixlet.rpc.gen import cri_pb2 as pb
from nixlet.services import relay
from nixlet.telemetry import metrics

#: The services that are handed on; v1alpha2 is what kubelets before 1.26 speak.
_PREFIXES = ("/runtime.v1.ImageService/", "/runtime.v1alpha2.ImageService/")


class Pulled(Protocol):
    """What a pull ends with."""

    @property
    def image_id(self) -> str:
        """What containers are made from."""
        ...


class NixPuller(Protocol):
    """Who pulls ``nix:0`` references."""

    def pull(self, text: str) -> Awaitable[Pulled]:
        """Have an image ready for containers."""
        ...


class Remarks:
    """What people should know of a pull from a registry that fails, beside containerd's error."""

    def __init__(self) -> None:
        #: Tells it; empty: nothing.
        self.tell: Callable[[], str] = lambda: ""


class NoNix:
    """On a node whose snapshotter can't show closures: says so."""

    def __init__(self, snapshotter: str) -> None:
        self._snapshotter = snapshotter

    async def pull(self, text: str) -> Pulled:
        """Refuse.

        Raises:
            FailedPreconditionError: Always.
        """
        raise errors.FailedPreconditionError(
            f"{text} is an image of store paths, which the snapshotter {self._snapshotter} can't run",
            hint="start the node with --snapshotter nix",
        )


class Listing:
    """Which images there are.

    Args:
        images: The image service that has them.
        untold_pins: Tells the names of images whose pins it keeps to itself; a kubelet would collect them. None: it tells all.
    """

    def __init__(
        self, images: cri.ImageClient, untold_pins: Callable[[], Awaitable[Collection[str]]] | None = None
    ) -> None:
        self._images = images
        self._untold_pins = untold_pins

    async def images(self) -> Sequence[pb.Image]:
        """All of them."""
        found = await self.completed(pb.ImageFilter())
        return await self._images.images() if found is None else found

    async def completed(self, filters: pb.ImageFilter) -> Sequence[pb.Image] | None:
        """Those that a filter names, with all pins; None where the image service itself says all there is to say."""
        pinned = await self._untold_pins() if self._untold_pins is not None else ()
        if not pinned:
            return None
        found = await self._images.images(filters)
        for image in found:
            image.pinned |= any(name in pinned for name in (*image.repo_tags, *image.repo_digests))
        return found


class ImageService:
    """Answers what no other service of the socket does."""

    def __init__(
        self,
        handing_on: relay.Relay,
        puller: NixPuller,
        records: recorded.Recorded,
        images: cri.ImageClient,
        observed: metrics.NodeMetrics | None,
        listing: Listing,
        remarks: Remarks | None = None,
        registry_pulls: registrypulls.RegistryPulls | None = None,
        ready: readiness.Readiness | None = None,
    ) -> None:
        """An image service.

        Args:
            handing_on: Gets what is not ours.
            puller: Pulls ``nix:0`` references.
            records: What containerd has by such references.
            images: containerd's own image service.
            observed: Counts pulls.
            listing: Tells which images there are.
            remarks: What goes with the errors of pulls.
            registry_pulls: Looks at what containerd pulls; None: nothing could be wrong with it.
            ready: Has images ready that are there already; None likewise.
        """
        self._registry_pulls = registry_pulls
        self._ready = ready
        self._remarks = remarks or Remarks()
        self._observed = observed or metrics.NodeMetrics()
        self._relay = handing_on
        self._puller = puller
        self._records = records
        self._images = images
        self._listing = listing
        self._handlers = {
            "PullImage": self._pull,
            "ImageStatus": self._status,
            "RemoveImage": self._remove,
            "ListImages": self._list,
        }

    async def answer(self, path: str, stream: "server.Stream[bytes, bytes]") -> None:
        """Answer a call; for use as a server's fallback."""
        if not path.startswith(_PREFIXES):
            raise errors.UnimplementedError(f"unknown method {path}")
        request = await server.request(stream)
        if path.rpartition("/")[2] != "PullImage":
            await self._dispatch(path, stream, request)
            return
        wanted = pb.PullImageRequest.FromString(request).image.image
        with self._observed.pull("nix" if reference.is_archive(wanted) else "registry") as succeed:
            status = await self._dispatch(path, stream, request)
            if status is Status.OK:
                succeed()

    async def _dispatch(self, path: str, stream: "server.Stream[bytes, bytes]", request: bytes) -> Status:
        handle = self._handlers.get(path.rpartition("/")[2])
        answer = await handle(request) if handle is not None else None
        if answer is None:
            if path.endswith("/PullImage"):
                return await self._hand_on_pull(path, stream, request)
            return await self._relay.answer(path, stream, request)
        await stream.send_message(answer)
        return Status.OK

    async def _hand_on_pull(self, path: str, stream: "server.Stream[bytes, bytes]", request: bytes) -> Status:
        remark = self._remarks.tell()
        if self._registry_pulls is None:
            return await self._relay.answer(path, stream, request, remark)
        wanted = pb.PullImageRequest.FromString(request).image.image
        async with self._registry_pulls.watched(wanted) as check:

            async def look_at(answer: bytes) -> None:
                await check(pb.PullImageResponse.FromString(answer).image_ref)

            return await self._relay.answer(path, stream, request, remark, look_at)

    async def _pull(self, request: bytes) -> bytes | None:
        wanted = pb.PullImageRequest.FromString(request).image.image
        if not reference.is_archive(wanted):
            return None
        pulled = await self._puller.pull(wanted)
        return pb.PullImageResponse(image_ref=pulled.image_id).SerializeToString()

    async def _status(self, request: bytes) -> bytes | None:
        # By our record of it, since CRI can't parse every path as a reference.
        parsed = pb.ImageStatusRequest.FromString(request)
        # Whoever is to make a container asks this first.
        if self._ready is not None:
            await self._ready.ensure(parsed.image.image)
        if not reference.is_archive(parsed.image.image):
            return None
        image_id = await self._records.image_id(parsed.image.image)
        if image_id is None:
            return pb.ImageStatusResponse().SerializeToString()
        return (await self._images.details(image_id, verbose=parsed.verbose)).SerializeToString()

    async def _remove(self, request: bytes) -> bytes | None:
        wanted = pb.RemoveImageRequest.FromString(request).image.image
        if not reference.is_archive(wanted):
            return None
        image_id = await self._records.image_id(wanted)
        if image_id is not None and await self._images.status(image_id) is not None:
            await self._images.remove(image_id)
        else:
            await self._records.forget(wanted)
        return pb.RemoveImageResponse().SerializeToString()

    async def _list(self, request: bytes) -> bytes | None:
        found = await self._listing.completed(pb.ListImagesRequest.FromString(request).filter)
        return None if found is None else pb.ListImagesResponse(images=found).SerializeToString()
