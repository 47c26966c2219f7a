"""Having the images that containers are to be made from: those that are there, and others pulled, with progress for whoever waits."""

from collections.abc import Callable

from nixlet import errors
from nixlet.containerd import cri
from nixlet.images import pulls
from nixlet.rpc.gen import cri_pb2
from nixlet.telemetry import progress

#: Kubernetes' words for when an image is pulled (imagePullPolicy).
ALWAYS = "Always"
NEVER = "Never"

#: Learns of the steps of pulls: of which image, and the step; None when a pull begins.
Teller = Callable[[str, progress.Progress | None], None]


def tell_nobody(_reference: str, _step: progress.Progress | None) -> None:
    """For those who don't want to know."""


class Obtainer:
    """Has images ready on one node.

    Args:
        images: The node's image service.
        exchange: Where its pulls publish what they do.
    """

    def __init__(self, images: cri.ImageClient, exchange: pulls.Exchange) -> None:
        self._images = images
        self._exchange = exchange

    async def obtain(
        self, wanted: str, policy: str, tell: Teller = tell_nobody, runtime: str = ""
    ) -> tuple[cri_pb2.Image, pulls.Pulled | None]:
        """An image, and what its pull took; None where nothing was pulled, or not from the store.

        Args:
            wanted: Its reference.
            policy: When it is pulled: ``ALWAYS``, ``NEVER``, or else where it isn't there.
            tell: Learns of the pull's steps.
            runtime: The runtime that is to run it; empty: the default one.

        Raises:
            NotFoundError: It is not there, and must not or can't be pulled.
            NixletError: It can't be pulled.
        """
        if policy != ALWAYS:
            image = await self._images.status(wanted, runtime)
            if image is not None:
                return image, None
            if policy == NEVER:
                raise errors.NotFoundError(
                    f"the image {wanted} is not here, and imagePullPolicy is Never", hint="pull or load it before"
                )
        image_id, took = await self._pull(wanted, tell, runtime)
        image = await self._images.status(image_id)
        if image is None:
            raise errors.NotFoundError(f"the image {wanted} was pulled, and removed at once by somebody")
        return image, took

    async def _pull(self, wanted: str, tell: Teller, runtime: str) -> tuple[str, pulls.Pulled | None]:
        tell(wanted, None)
        ended: list[pulls.Event] = []

        def take(event: pulls.Event) -> None:
            if event.reference == wanted:
                if event.step is None:
                    ended.append(event)
                else:
                    tell(wanted, event.step)

        with self._exchange.subscribed(take):
            try:
                image_id = await self._images.pull(wanted, runtime=runtime)
            except errors.NixletError as error:
                # Clients of the CRI learn little of the host's files, and have little room; ours learn why.
                for event in ended:
                    if isinstance(event.error, errors.NixletError):
                        raise event.error from error
                raise
        return image_id, next((event.pulled for event in ended if event.pulled is not None), None)
