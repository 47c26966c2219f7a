"""Images for whoever asks the node: the method ListImages."""

from collections.abc import Mapping

from nixlet.services import images
from nixlet.varlink import server


class ImagesService:
    """Answers for one node's images.

    Args:
        listing: Tells which there are.
    """

    def __init__(self, listing: images.Listing) -> None:
        self._listing = listing

    def methods(self) -> Mapping[str, server.Method]:
        """Its methods."""
        return {"ListImages": server.Method(server.Nothing, self._list)}

    async def _list(self, _: server.Call[server.Nothing]) -> Mapping[str, object]:
        return {
            "images": [
                {
                    "id": image.id,
                    "tags": list(image.repo_tags),
                    "digests": list(image.repo_digests),
                    "size": image.size,
                    "pinned": image.pinned,
                }
                for image in await self._listing.images()
            ]
        }
