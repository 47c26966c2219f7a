"""What containerd has under ``nix:0`` references: CRI can't parse every path as a reference, so its records are asked."""

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import platforms, reference, targets
from nixlet.store import paths


class Recorded:
    """The images of one containerd that have such names, whoever gave them: pulls, imports, other clients.

    Args:
        containerd: The containerd.
        store_dir: The store that references are of.
    """

    def __init__(self, containerd: imagestore.ImageStore, store_dir: str = paths.DEFAULT_STORE_DIR) -> None:
        self._containerd = containerd
        self._store_dir = store_dir

    async def shown_as(self, text: str) -> str | None:
        """What CRI finds an image by that is recorded by this reference: the name, or the ID where CRI can't read the name.

        Raises:
            InvalidArgumentError: It is no reference.
        """
        name = self._name(text)
        return name if reference.is_known_to_registries(name) else await self.image_id(text)

    async def image_id(self, text: str) -> str | None:
        """The ID of the image that is recorded by this reference, or None.

        Raises:
            InvalidArgumentError: It is no reference.
        """
        record = await self._containerd.image(self._name(text))
        if record is None:
            return None
        try:
            # Others can give such a name, too, and to an index.
            found = await targets.manifest_of(self._containerd, record.target.digest, platforms.host_platform())
        except errors.NotFoundError:
            return None
        return found.config.digest

    async def forget(self, text: str) -> None:
        """Delete the record of an image that CRI doesn't know, since something of it is gone; none at all is no error."""
        record = await self._containerd.image(self._name(text))
        if record is None:
            return
        await self._containerd.delete_image(record)
        await forget_nameless(self._containerd, record.target.digest)

    def _name(self, text: str) -> str:
        return reference.canonical(reference.parse(text, self._store_dir))


async def forget_nameless(containerd: imagestore.ImageStore, digest: str) -> None:
    """Delete an image's record by its ID where there is none by a name: nobody can name it any more.

    Args:
        containerd: The containerd.
        digest: What the records lead to.
    """
    left = await containerd.images(f"target.digest=={digest}")
    if all(each.name.startswith("sha256:") for each in left):
        for each in left:
            await containerd.delete_image(each)
