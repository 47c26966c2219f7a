"""Importing all images of an archive, as ``nixlet image load`` does: which they are, what they are called, and the loading."""

import dataclasses
from collections.abc import AsyncIterator, Sequence

from nixlet import errors
from nixlet.containerd import cri
from nixlet.images import archive, loader, platforms, pulls, reference
from nixlet.store import paths
from nixlet.telemetry import progress


@dataclasses.dataclass(frozen=True, slots=True)
class Named:
    """An image of an archive, and the names that it gets, as containerd records them."""

    image: archive.ArchiveImage
    names: Sequence[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """How an archive's images are to be called.

    Attributes:
        places: The archive's absolute paths, the one that it goes by first; none for a pipe.
        name: The name for its only image, as a person writes it; None: the archive's own, or its place.
        store_dir: The store that ``nix:0`` references are of.
    """

    places: Sequence[str]
    name: str | None = None
    store_dir: str = paths.DEFAULT_STORE_DIR

    def read(self, source: archive.Archive) -> Sequence[Named]:
        """The images of an archive for this machine; reads files, and belongs into a thread.

        Raises:
            InvalidArgumentError: The archive or the name is malformed, or the name is for one image and there are several.
            UnsupportedError: All of it is for other platforms.
        """
        found = source.images(platforms.host_platform())
        if self.name is None:
            return [*map(Named, found, archive.recorded_names(found, self.places))]
        if len(found) > 1:
            raise errors.InvalidArgumentError(
                f"--ref names one image, and {source.label} holds {len(found)}", hint="load them without it"
            )
        return [Named(found[0], [reference.canonical(reference.parse(self.name, self.store_dir))])]


async def load(
    loads: loader.Loader,
    source: archive.Archive,
    found: Sequence[Named],
    shown: cri.ImageClient | None,
    sink: progress.ProgressSink,
) -> AsyncIterator[str]:
    """Load images; gives each name when it is recorded, and stays so whatever becomes of the next.

    Args:
        loads: Loads them.
        source: The open archive.
        found: What is in it.
        shown: CRI's image service, which is to show them before a container is run from them; None: there is none.
        sink: Gets the progress.

    Raises:
        NixletError: As ``loader.Loader.load`` and ``pulls.wait_for_cri``.
    """
    for each in found:
        loaded = await loads.load(source, each.image, each.names, sink=sink)
        for name in each.names:
            yield name
        if shown is not None:
            await pulls.wait_for_cri(shown, loaded.image_id, each.names)
