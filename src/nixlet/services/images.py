"""The CRI image service: ``nix:0`` references are pulled from the store, everything else is containerd's business.

Calls are looked at as bytes. Those that don't concern a ``nix:0`` reference go to containerd and back unchanged, as do methods that
nixlet has never heard of. What containerd pulled is looked at before its answer goes on, and the pull fails if containers would see the
wrong closure.
"""

import dataclasses
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from grpclib.const import Status

from nixlet import errors
from nixlet.containerd import cri, handlers
from nixlet.images import readiness, recorded, reference, registrypulls
from nixlet.rpc import server, status
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

    def pull(self, text: str, elsewhere: str = "") -> Awaitable[Pulled]:
        """Have an image ready for containers, of another snapshotter than ours where one is named."""
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

    async def pull(self, text: str, elsewhere: str = "") -> Pulled:
        """Refuse.

        Raises:
            FailedPreconditionError: Always.
        """
        raise errors.FailedPreconditionError(
            f"{text} is an image of store paths, which the snapshotter {elsewhere or self._snapshotter} can't run",
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
        pinned = await self.untold_pins()
        if not pinned:
            return None
        found = await self._images.images(filters)
        for image in found:
            _pin(image, pinned)
        return found

    async def untold_pins(self) -> Collection[str]:
        """The names of images that are pinned, where the image service keeps that to itself."""
        return await self._untold_pins() if self._untold_pins is not None else ()


def _pin(image: pb.Image, pinned: Collection[str]) -> None:
    image.pinned |= any(name in pinned for name in (image.id, *image.repo_tags, *image.repo_digests))


@dataclasses.dataclass(frozen=True, slots=True)
class ForPaths:
    """What a node has besides whose snapshotter shows store paths.

    Attributes:
        registry_pulls: Looks at what containerd pulls.
        ready: Has images ready that are there already.
        handlers: Tells whether a pod's runtime wants images for another snapshotter.
    """

    registry_pulls: registrypulls.RegistryPulls
    ready: readiness.Readiness
    handlers: handlers.Handlers


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
        for_paths: ForPaths | None = None,
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
            for_paths: What containers of store paths need; None where there can be none.
        """
        self._for_paths = for_paths
        self._remarks = remarks or Remarks()
        self._observed = observed or metrics.NodeMetrics()
        self._relay = handing_on
        self._puller = puller
        self._records = records
        self._images = images
        self._listing = listing

    async def answer(self, path: str, stream: "server.Stream[bytes, bytes]") -> None:
        """Answer a call; for use as a server's fallback."""
        if not path.startswith(_PREFIXES):
            raise errors.UnimplementedError(f"unknown method {path}")
        request = await server.request(stream)
        try:
            await self._answer(path, stream, request)
        except errors.NixletError as error:
            # A kubelet shows what keeps it from an image in an event, whatever it asked.
            raise status.shortened(error) from error

    async def _answer(self, path: str, stream: "server.Stream[bytes, bytes]", request: bytes) -> None:
        match path.rpartition("/")[2]:
            case "PullImage":
                await self._pull(path, stream, request)
            case "ImageStatus":
                await self._status(path, stream, request)
            case "RemoveImage":
                await self._answered_or_handed_on(path, stream, request, await self._remove(request))
            case "ListImages":
                await self._answered_or_handed_on(path, stream, request, await self._list(request))
            case _:
                await self._relay.answer(path, stream, request)

    async def _answered_or_handed_on(
        self, path: str, stream: "server.Stream[bytes, bytes]", request: bytes, answer: bytes | None
    ) -> None:
        if answer is None:
            await self._relay.answer(path, stream, request)
        else:
            await stream.send_message(answer)

    async def _pull(self, path: str, stream: "server.Stream[bytes, bytes]", request: bytes) -> None:
        parsed = pb.PullImageRequest.FromString(request)
        is_archive = reference.is_archive(parsed.image.image)
        with self._observed.pull("nix" if is_archive else "registry") as succeed:
            elsewhere = await self._elsewhere(parsed.image, parsed.sandbox_config)
            if is_archive:
                pulled = await self._puller.pull(parsed.image.image, elsewhere)
                await stream.send_message(pb.PullImageResponse(image_ref=pulled.image_id).SerializeToString())
                ended = Status.OK
            else:
                ended = await self._hand_on_pull(path, stream, request, parsed.image.image, elsewhere)
            if ended is Status.OK:
                succeed()

    async def _hand_on_pull(
        self, path: str, stream: "server.Stream[bytes, bytes]", request: bytes, wanted: str, elsewhere: str
    ) -> Status:
        remark = self._remarks.tell()
        if self._for_paths is None:
            return await self._relay.answer(path, stream, request, remark)
        async with self._for_paths.registry_pulls.watched(wanted, elsewhere) as check:

            async def look_at(answer: bytes) -> None:
                await check(pb.PullImageResponse.FromString(answer).image_ref)

            return await self._relay.answer(path, stream, request, remark, look_at)

    async def _elsewhere(self, image: pb.ImageSpec, sandbox: pb.PodSandboxConfig | None = None) -> str:
        """The snapshotter that a request's runtime has, where it isn't the node's."""
        return await self._for_paths.handlers.elsewhere(image, sandbox) if self._for_paths is not None else ""

    async def _status(self, path: str, stream: "server.Stream[bytes, bytes]", request: bytes) -> None:
        parsed = pb.ImageStatusRequest.FromString(request)
        wanted = parsed.image.image
        name: str | None = wanted
        if reference.is_archive(wanted):
            name = await self._records.shown_as(wanted)

        async def look_at(answer: bytes) -> None:
            # Whoever is to make a container asks this first.
            shown = pb.ImageStatusResponse.FromString(answer)
            if self._for_paths is not None and shown.HasField("image"):
                elsewhere = await self._elsewhere(parsed.image)
                await self._for_paths.ready.ensure(wanted, shown.image, elsewhere)

        pinned = await self._listing.untold_pins()
        if name == wanted and not pinned:
            await self._relay.answer(path, stream, request, look_at=look_at)
            return
        found = pb.ImageStatusResponse()
        if name is not None:
            found = await self._images.details(name, verbose=parsed.verbose)
        if found.HasField("image"):
            _pin(found.image, pinned)
        answer = found.SerializeToString()
        await look_at(answer)
        await stream.send_message(answer)

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
