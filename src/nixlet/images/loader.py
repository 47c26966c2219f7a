"""Loading an image into containerd: content, record, and unpacked layers, over its own API.

Works with every containerd, since it needs neither the Transfer service nor a client that passes annotations on: each layer's
snapshot is prepared with the annotations as labels, applied by containerd's Diff service, and committed under its chain ID.
"""

import asyncio
import contextlib
import dataclasses
import io
import os
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping, Sequence
from typing import Any

from nixlet import errors
from nixlet.containerd import imagestore, namespaces
from nixlet.host import uncut
from nixlet.images import archive, closurecheck, copying, lostlayers, model, recorded, reference, targets
from nixlet.rpc.gen import containerd_types_pb2
from nixlet.store import closures, interface, paths, realiser
from nixlet.telemetry import progress

#: How often a layer is begun that somebody else unpacks and removes meanwhile.
_TRIES = 5

#: Seconds for containerd to take back what a load began that ends in the middle: it goes with the load's lease as well.
_UNDO_TIMEOUT = 5.0

_SNAPSHOT_REF = "containerd.io/snapshot.ref"

#: The label that names what an image was loaded from (the archive's nar hash), and the manifest that was found there.
_ORIGIN = "io.nixlet.origin"

#: The label by which CRI knows its images; it sets it by itself on what it sees appear.
MANAGED = {"io.cri-containerd.image": "managed"}


@dataclasses.dataclass(frozen=True, slots=True)
class Loaded:
    """An image that was loaded.

    Attributes:
        image_id: Its ID, the digest of its configuration.
        closure_paths: How many store paths its layers name.
        took: What had to be fetched of them.
    """

    image_id: str
    closure_paths: int
    took: interface.Realised


def came_from(origin: str, digest: str) -> dict[str, str]:
    """The label for an image's record that lets ``Loader.load_again`` find it.

    Args:
        origin: What it is loaded from.
        digest: Its manifest's: a record that somebody lets lead elsewhere keeps its labels.
    """
    return {_ORIGIN: f"{origin} {digest}"}


class _GoneError(errors.NotFoundError):
    """A blob is not in containerd any more."""


class _Nothing:
    """What an image is loaded from of which containerd has everything."""

    def __init__(self, label: str) -> None:
        self.label = label

    def open_blob(self, digest: str) -> io.BufferedIOBase:
        """Nobody should ask.

        Raises:
            _GoneError: Always.
        """
        raise _GoneError(f"{digest} of {self.label} is gone from containerd")


class Loader:
    """Loads images into one containerd for one snapshotter.

    Args:
        containerd: The containerd.
        snapshotter: What it calls the snapshotter.
        realise: Brings the store paths that layers name; None where the snapshotter can't show them.
    """

    def __init__(
        self, containerd: imagestore.ImageStore, snapshotter: str, realise: realiser.Realiser | None = None
    ) -> None:
        self._containerd = containerd
        self._snapshotter = snapshotter
        self._realiser = realise
        self._check = closurecheck.ClosureCheck(snapshotter, realise)

    @property
    def snapshotter(self) -> str:
        """What containerd calls the snapshotter that it loads for."""
        return self._snapshotter

    @property
    def store_dir(self) -> str:
        """The store whose paths images name."""
        return paths.DEFAULT_STORE_DIR if self._realiser is None else self._realiser.store_dir

    async def load_again(self, name: str, origin: str, sink: progress.ProgressSink) -> Loaded | None:
        """Have an image that was loaded under a name from the same origin before, without the archive.

        Returns None where it wasn't, or something of it is gone.

        Args:
            name: As containerd records it.
            origin: What it must have been loaded from.
            sink: Gets the progress.

        Raises:
            NixletError: As ``load``.
        """
        record = await self._containerd.image(name)
        if record is None or not came_from(origin, record.target.digest).items() <= record.labels.items():
            return None
        try:
            text = await targets.read_text(self._containerd, record.target.digest)
            manifest = model.decode(text, model.Manifest, name)
            config = await targets.read_config(self._containerd, manifest)
        except errors.NotFoundError:
            return None
        for chain_id in model.chain_ids(config.rootfs.diff_ids):
            if await self._containerd.snapshot(self._snapshotter, chain_id) is None:
                return None
        target = record.target
        descriptor = model.Descriptor(media_type=target.media_type, digest=target.digest, size=target.size)
        layers = tuple(map(archive.Layer, manifest.layers, config.rootfs.diff_ids))
        image = archive.ArchiveImage((), descriptor, manifest, config, layers)
        try:
            return await self.load(_Nothing(name), image, [name], sink=sink)
        except _GoneError:
            return None

    async def load(
        self,
        source: copying.Source,
        image: archive.ArchiveImage,
        names: Sequence[str],
        *,
        labels: Mapping[str, str] | None = None,
        sink: progress.ProgressSink = progress.ignore,
    ) -> Loaded:
        """Load an image under names, each taken from the image that has it now; realise first what its layers name.

        Args:
            source: The open archive that holds it.
            image: The image.
            names: As containerd records them. They are the caller's choice: what a foreign archive calls its image itself
                must not take a name away from another.
            labels: For the records.
            sink: Gets the progress.

        Raises:
            InvalidArgumentError: A name has the digest of another image.
            FailedPreconditionError: A layer is there already, with another closure; or the snapshotter can't show store paths.
            NixletError: A layer can't be read, realised or unpacked; nothing of it stays once containerd has collected.
        """
        for name in names:
            if reference.digest_in(name) not in {"", image.descriptor.digest}:
                raise errors.InvalidArgumentError(
                    f"{source.label} can't be loaded as {name}: its digest is {image.descriptor.digest}",
                    hint="name it by a tag",
                )
        # Before anybody is asked: it may be refused.
        named = self._named(image.layers)
        manifest = image.manifest
        chain = model.chain_ids([layer.diff_id for layer in image.layers])
        # Labels tell containerd's garbage collector what a blob needs: the configuration its snapshots, the manifest
        # the configuration and the layers.
        references = {"containerd.io/gc.ref.content.config": manifest.config.digest}
        for number, descriptor in enumerate(manifest.layers):
            references[f"containerd.io/gc.ref.content.l.{number}"] = descriptor.digest
        blobs: list[copying.Labelled] = [(layer.descriptor, {}) for layer in image.layers]
        blobs += [(manifest.config, self._needing(chain)), (image.descriptor, references)]
        target = imagestore.Descriptor(image.descriptor.media_type, image.descriptor.digest, image.descriptor.size)
        record = imagestore.Record(target, {**MANAGED, **(labels or {})})
        image_id = manifest.config.digest if self._containerd.namespace == namespaces.CRI else ""
        if (known := await self._found(names, image_id, record, blobs, image.layers, chain, named)) is not None:
            return Loaded(manifest.config.digest, known, interface.Realised())
        async with (
            self._containerd.leased() as containerd,
            copying.beside(containerd, source, blobs) as copied,
            self._realised(named, sink) as (closure_paths, took),
        ):
            total = len(image.layers)
            parent = ""
            for number, (layer, chain_id) in enumerate(zip(image.layers, chain, strict=True)):
                sink(progress.Progress("loading", number, total, "layers"))
                await self._unpack(containerd, layer, parent, chain_id, copied)
                parent = chain_id
            for blob, _ in blobs:
                await copied(blob.digest)
            await self._record(containerd, image_id, names, record)
            sink(progress.Progress("loading", total, total, "layers"))
        return Loaded(manifest.config.digest, closure_paths, took)

    @staticmethod
    async def _record(
        containerd: imagestore.ImageStore, image_id: str, names: Sequence[str], record: imagestore.Record
    ) -> None:
        """Record an image by its ID, if that is to be, and by its names: by the ID alone nobody would know it."""
        # CRI makes a record by the ID of what it takes for somebody else's alone, and volumes of images need it.
        lacks_it = bool(image_id) and await containerd.image(image_id) is None
        try:
            if lacks_it:
                await containerd.create_image(image_id, record.target, MANAGED)
            for name in names:
                await containerd.put_image(name, record.target, record.labels)
        except BaseException:
            # (also where it may have been made, and nobody was told)
            if lacks_it:
                await _undone(recorded.forget_nameless(containerd, record.target.digest))
            raise

    async def unpack(self, manifest: model.Manifest, config: model.ImageConfig) -> None:
        """Unpack the layers of an image that containerd has, as far as they aren't unpacked with the closures that they name.

        Raises:
            FailedPreconditionError: A layer is there already, with another closure; or the snapshotter can't show store paths.
            NixletError: A layer is gone, or can't be realised or unpacked.
        """
        layers = tuple(map(archive.Layer, manifest.layers, config.rootfs.diff_ids))
        chain = model.chain_ids(config.rootfs.diff_ids)
        named = self._named(layers)
        async with self._realised(named, progress.ignore), self._containerd.leased() as containerd:
            parent = ""
            for layer, chain_id in zip(layers, chain, strict=True):
                await self._unpack(containerd, layer, parent, chain_id)
                parent = chain_id
            await containerd.label_content(manifest.config.digest, self._needing(chain))

    async def _found(
        self,
        names: Sequence[str],
        image_id: str,
        record: imagestore.Record,
        blobs: Sequence[copying.Labelled],
        layers: Sequence[archive.Layer],
        chain: Sequence[str],
        named: Sequence[closures.ClosureReference],
    ) -> int | None:
        """How many store paths an image names of which all is there, as loading would leave it; None: something is missing.

        It only looks: nothing is written, and Nix isn't asked. What is recorded is kept by that from containerd's collector, and
        what is unpacked by its roots from Nix's.
        """
        known = await asyncio.gather(*map(self._containerd.image, (*names, *([image_id] if image_id else ()))))
        if None in known or not all(each is not None and record.is_met_by(each) for each in known[: len(names)]):
            return None
        contents, snapshots, members = await asyncio.gather(
            asyncio.gather(*(self._containerd.content_labels(blob.digest) for blob, _ in blobs)),
            asyncio.gather(*(self._containerd.snapshot(self._snapshotter, name) for name in chain)),
            self._on_disk(named),
        )
        for there, (_, wanted) in zip(contents, blobs, strict=True):
            if there is None or not wanted.items() <= there.items():
                return None
        for info, layer in zip(snapshots, layers, strict=True):
            if info is None or not self._check.is_named_alike(layer, info.labels):
                return None
        return None if members is None else len(members)

    async def _on_disk(self, named: Sequence[closures.ClosureReference]) -> Collection[paths.StorePath] | None:
        return await self._realiser.on_disk(named) if named and self._realiser is not None else ()

    def _named(self, layers: Sequence[archive.Layer]) -> Sequence[closures.ClosureReference]:
        """The closures that layers name; none where the snapshotter can't show them.

        Raises:
            InvalidArgumentError: What a layer says is malformed.
            FailedPreconditionError: There are some, and the snapshotter can't.
        """
        named = [each for layer in layers if (each := self._check.named(layer.descriptor.annotations)) is not None]
        if named and self._realiser is None:
            raise closurecheck.not_shown_by(self._snapshotter)
        return named

    def _needing(self, chain: Sequence[str]) -> dict[str, str]:
        """The label that keeps an image's snapshots, for its configuration."""
        return {f"containerd.io/gc.ref.snapshot.{self._snapshotter}": chain[-1]} if chain else {}

    @contextlib.asynccontextmanager
    async def _realised(
        self, named: Sequence[closures.ClosureReference], sink: progress.ProgressSink
    ) -> AsyncIterator[tuple[int, interface.Realised]]:
        """Realise what layers name, before containerd unpacks them: here is a channel for progress and exact errors.

        Nix keeps it for the time of the context; afterwards the snapshotter's roots do.
        """
        if not named or self._realiser is None:
            yield 0, interface.Realised()
            return
        async with self._realiser.all_realised(named, sink) as found:
            members = {member for closure in found.values() for member in closure.members}
            yield len(members), sum((closure.took for closure in found.values()), interface.Realised())

    async def _unpack(
        self,
        containerd: imagestore.ImageStore,
        layer: archive.Layer,
        parent: str,
        name: str,
        copied: copying.Copied | None = None,
    ) -> None:
        """Unpack a layer, unless it is; its snapshot is prepared while its blob is still being copied."""
        labels = {**closurecheck.inherited(layer), _SNAPSHOT_REF: name}
        for attempt in range(_TRIES):
            key = f"extract-{os.urandom(8).hex()} {name}"
            try:
                mounts = await containerd.prepare_snapshot(self._snapshotter, key, parent, labels)
            except errors.AlreadyExistsError:
                if await self._check.take_unpacked(containerd, layer, name):
                    return
                # The first time somebody may have been about to remove it.
                if attempt > 0:
                    await lostlayers.forget(containerd, self._snapshotter, name)
                continue
            committed = False
            try:
                waited = copied is not None and await copied(layer.descriptor.digest)
                # Somebody else may have unpacked the same layer by now.
                if not waited or await containerd.snapshot(self._snapshotter, name) is None:
                    await self._unpack_onto(containerd, layer, mounts)
                    with contextlib.suppress(errors.AlreadyExistsError):
                        await containerd.commit_snapshot(self._snapshotter, name, key, labels)
                        committed = True
            finally:
                if not committed:
                    await _undone(containerd.remove_snapshot(self._snapshotter, key))
            if committed:
                return
        raise errors.UnavailableError(f"the layer {layer.descriptor.digest} comes and goes in containerd")

    @staticmethod
    async def _unpack_onto(
        containerd: imagestore.ImageStore, layer: archive.Layer, mounts: Sequence[containerd_types_pb2.Mount]
    ) -> None:
        blob = layer.descriptor
        applied = await containerd.apply(imagestore.Descriptor(blob.media_type, blob.digest, blob.size), mounts)
        if applied != layer.diff_id:
            raise errors.InvalidArgumentError(
                f"the layer {blob.digest} unpacks to {applied}, but the image's configuration says {layer.diff_id}"
            )


async def _undone(undoing: Coroutine[Any, Any, None]) -> None:
    """Have something undone, also for a caller that is cancelled meanwhile; what can't be in time is left to containerd's collector."""

    async def undo() -> None:
        with contextlib.suppress(errors.NixletError, TimeoutError):
            async with asyncio.timeout(_UNDO_TIMEOUT):
                await undoing

    await uncut.to_its_end(undo())
