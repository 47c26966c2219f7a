"""Whether the containers of an image see its own closures: layers of equal content are one snapshot, which can have one closure."""

import contextlib
from collections.abc import Mapping

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import archive, model, targets
from nixlet.store import closures, paths, realiser

#: Annotations below this name become labels of the layer's snapshot, as containerd's own unpacker does.
_INHERITED = "containerd.io/snapshot/"


def inherited(layer: archive.Layer) -> dict[str, str]:
    """What a layer's snapshot gets of its annotations as labels."""
    annotations = layer.descriptor.annotations or {}
    return {key: value for key, value in annotations.items() if key.startswith(_INHERITED)}


def may_name_paths(layer: model.Descriptor) -> bool:
    """Whether a layer has annotations of ours."""
    return any(key.startswith(closures.PREFIX) for key in layer.annotations or {})


def not_shown_by(snapshotter: str, what: str = "the image") -> errors.FailedPreconditionError:
    """The refusal of an image of store paths where the snapshotter shows none.

    Args:
        snapshotter: What containerd calls it.
        what: The image, for the sentence.
    """
    return errors.FailedPreconditionError(
        f"{what} is made of store paths, which the snapshotter {snapshotter} can't run",
        hint="start the node with --snapshotter nix, or, where a pod's runtime class has a snapshotter of its own, use one without",
    )


class ClosureCheck:
    """Compares layers that are unpacked with what images name for them.

    Args:
        snapshotter: What containerd calls the snapshotter.
        realise: Brings the store paths that layers name; None where the snapshotter can't show them.
    """

    def __init__(self, snapshotter: str, realise: realiser.Realiser | None) -> None:
        self._snapshotter = snapshotter
        self._realiser = realise

    def named(self, annotations: Mapping[str, str] | None) -> closures.ClosureReference | None:
        """The closure that a layer's annotations or labels name, or None.

        Raises:
            InvalidArgumentError: They are malformed.
        """
        store_dir = self._realiser.store_dir if self._realiser is not None else paths.DEFAULT_STORE_DIR
        return closures.parse_annotations(annotations or {}, store_dir)

    def is_named_alike(self, layer: archive.Layer, labels: Mapping[str, str]) -> bool:
        """Whether a snapshot's labels name what the layer does, word for word: a quick look, which costs no realising.

        Raises:
            InvalidArgumentError: Either is malformed.
        """
        there, wanted = self.named(labels), self.named(layer.descriptor.annotations)
        if there is None or wanted is None:
            return there is wanted
        return there.identity == wanted.identity

    async def take_unpacked(self, containerd: imagestore.ImageStore, layer: archive.Layer, chain_id: str) -> bool:
        """Take a layer that is unpacked already, if containers of this image see their own closure in it.

        Returns False if the layer isn't there.

        Args:
            containerd: The containerd; a client with a lease keeps the layer by it.
            layer: The image's layer.
            chain_id: The name of its snapshot.

        Raises:
            FailedPreconditionError: It has another closure.
            NixletError: It has none, and the image's can't be had.
        """
        info = await containerd.hold_snapshot(self._snapshotter, chain_id)
        if info is None:
            return False
        there, wanted = self.named(info.labels), self.named(layer.descriptor.annotations)
        if self._realiser is None or await self._are_equal(self._realiser, there, wanted):
            return True
        users = await _images_with(containerd, chain_id)
        others = [
            name for name, each in users.items() if not await self._are_equal(self._realiser, self.named(each), wanted)
        ]
        if there is None and wanted is not None and not others:
            # A client that passes no annotations on unpacked it before: its containers would see empty mount points. The
            # labels mend that, but for an image that really has none.
            async with self._realiser.realised(wanted):
                await containerd.label_snapshot(self._snapshotter, chain_id, inherited(layer))
            return True
        raise errors.FailedPreconditionError(
            f"the layer {layer.descriptor.digest} can't be loaded with {_shown(wanted)}: "
            f"{', '.join(others) or 'an image that was removed'} has the same layer with {_shown(there)}",
            hint="remove that image first (nixlet crictl rmi), or build one of them again so that the layers differ",
        )

    @staticmethod
    async def _are_equal(
        realise: realiser.Realiser, one: closures.ClosureReference | None, other: closures.ClosureReference | None
    ) -> bool:
        if one is None or other is None:
            return one is other
        if one.identity == other.identity:
            return True
        try:
            # The same paths can be listed by several closureInfos.
            async with realise.all_realised([one, other]) as found:
                return found[one.identity].members == found[other.identity].members
        except errors.NixletError:
            return False


def _shown(closure: closures.ClosureReference | None) -> str:
    if closure is None:
        return "no closure"
    if closure.closure_info is not None:
        return f"the closure {closure.closure_info}"
    return f"a closure of {len(closure.listed)} paths"


async def _images_with(containerd: imagestore.ImageStore, chain_id: str) -> dict[str, Mapping[str, str]]:
    """The images that need a snapshot, as far as they can be read: their names, and the annotations of that layer."""
    found: dict[str, Mapping[str, str]] = {}
    for record in sorted(await containerd.images(), key=lambda each: each.name):
        # CRI has another record of each image, by its ID.
        if record.name.startswith("sha256:"):
            continue
        for manifest in await targets.manifests_of(containerd, record.target.digest):
            with contextlib.suppress(errors.NixletError):
                config = await targets.read_config(containerd, manifest)
                for layer, each in zip(manifest.layers, model.chain_ids(config.rootfs.diff_ids), strict=False):
                    if each == chain_id:
                        found[record.name] = layer.annotations or {}
    return found
