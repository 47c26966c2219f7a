"""Image archives: one tar file that holds an OCI image layout, a Docker archive, or both.

Sources: OCI image layout specification 1.1; for ``manifest.json`` the Docker image specification 1.2, "Combined Image JSON +
Filesystem Changeset Format". Nothing is extracted: blobs are ranges of the file, and are verified as they are read. Everything
here reads files and may be slow for big archives: call it in a thread.
"""

import contextlib
import dataclasses
import io
import os
import threading
from collections.abc import Iterator, Sequence

import msgspec

from nixlet import errors
from nixlet.images import archivefile, archivepath, expand, model, platforms, reference, tarball

#: How much of a blob is read at a time (bytes).
_CHUNK = 1024 * 1024

_MAX_NESTING = 4
_MAX_ENTRIES = 1000

#: How much JSON an archive may have in all (bytes): what is read of it takes some times as much memory.
_MAX_TEXT = 16 * model.MAX_JSON_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A layer of an image: its blob with its annotations and OCI's name for how it is packed; its digest when unpacked."""

    descriptor: model.Descriptor
    diff_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class ArchiveImage:
    """An image of an archive, for one platform.

    Attributes:
        names: The references that the archive has for it, as containerd records them; may be empty.
        descriptor: The manifest's. Its blob, the configuration's and the layers' can be opened in the archive.
        manifest: The manifest; a Docker archive's is made here.
        config: The configuration.
        layers: The lowest first.
    """

    names: tuple[str, ...]
    descriptor: model.Descriptor
    manifest: model.Manifest
    config: model.ImageConfig
    layers: tuple[Layer, ...]


#: What a manifest leads to.
_Contents = tuple[model.Manifest, model.ImageConfig, tuple[Layer, ...]]


class Archive:
    """An open archive. Blobs can be read while its context lasts."""

    def __init__(self, files: tarball.Tarball) -> None:
        self._files = files
        #: What a Docker archive has under other names than its digest, and manifests made for it.
        self._members: dict[str, tarball.Member] = {}
        self._made: dict[str, bytes] = {}
        #: What manifests say, by their digests: an index may name one again and again.
        self._known: dict[str, _Contents | None] = {}
        self._read_bytes = 0

    @property
    def label(self) -> str:
        """What errors call it."""
        return self._files.label

    def image(self, platform: model.Platform) -> ArchiveImage:
        """The archive's only image, in the form that suits a platform best.

        Raises:
            InvalidArgumentError: As ``images``; or there are several.
        """
        found = self.images(platform)
        if len(found) > 1:
            raise errors.InvalidArgumentError(
                f"{self._files.label} holds {len(found)} images, where one is wanted",
                hint="save each image to an archive of its own, or load them all with nixlet image load",
            )
        return found[0]

    def images(self, platform: model.Platform) -> tuple[ArchiveImage, ...]:
        """All images, each in the form that suits a platform best; those for other platforms only are left out.

        Raises:
            InvalidArgumentError: The archive is malformed or incomplete.
            UnsupportedError: All of it is for other platforms.
        """
        if "index.json" in self._files:
            found, offered = self._from_layout(platform)
        elif "manifest.json" in self._files:
            found, offered = self._from_docker(platform)
        else:
            raise self._files.malformed("it has neither index.json nor manifest.json")
        if found:
            return _merge(found)
        if not offered:
            raise self._files.malformed("it holds no image")
        shown = ", ".join(sorted({str(each) for each in offered})[:8])
        raise errors.UnsupportedError(
            f"{self._files.label}: the image is for {shown}, this machine is {platform}",
            hint="build or save the image for this machine's platform",
        )

    def open_blob(self, digest: str) -> io.BufferedIOBase:
        """Read a blob: a manifest, a configuration or a layer.

        The digest is checked before the last bytes are handed out: a read raises InvalidArgumentError if it is wrong.

        Raises:
            InvalidArgumentError: The archive doesn't hold it.
        """
        made = self._made.get(digest)
        if made is not None:
            return io.BytesIO(made)
        return io.BufferedReader(tarball.DigestReader(self._files, self._find(digest), digest), _CHUNK)

    def read_blob(self, digest: str) -> bytes:
        """The whole of a small blob: a manifest or a configuration.

        Raises:
            InvalidArgumentError: The archive doesn't hold it, its digest is wrong, it is larger than 4 MiB, or all are than 64 MiB.
        """
        if digest not in self._made:
            self._count(digest, self._find(digest).size)
        with self.open_blob(digest) as blob:
            return blob.read()

    def _find(self, digest: str) -> tarball.Member:
        return self._members.get(digest) or self._files.find(f"blobs/{digest.replace(':', '/')}")

    def _read_file(self, name: str) -> bytes:
        member = self._files.find(name)
        self._count(name, member.size)
        return self._files.read(member, 0, member.size)

    def _count(self, name: str, size: int) -> None:
        """Check that a file, and all that is read, is no larger than such are."""
        if size > model.MAX_JSON_BYTES:
            raise self._files.malformed(f"{name[:200]} is larger than {model.MAX_JSON_BYTES} bytes")
        self._read_bytes += size
        if self._read_bytes > _MAX_TEXT:
            raise self._files.malformed(f"its manifests and configurations have more than {_MAX_TEXT} bytes")

    def _from_layout(self, platform: model.Platform) -> tuple[list[ArchiveImage], list[model.Platform]]:
        offered: list[model.Platform] = []
        docker_names = self._docker_names()
        # An entry of the outermost index is an image, or one form of it where several entries have one whole name.
        named: dict[str, list[tuple[int, ArchiveImage]]] = {}
        for number, (name, forms) in enumerate(self._entries()):
            ranked: list[tuple[int, ArchiveImage]] = []
            for descriptor in forms:
                stated = descriptor.platform
                rank = None if stated is None else platforms.rank(stated, platform)
                if stated is not None and rank is None:
                    # Its blobs may be missing: exporters leave other platforms out but keep the index whole.
                    if stated.os != "unknown":
                        offered.append(stated)
                    continue
                image = self._read_image(descriptor, name, docker_names)
                if image is None:
                    continue
                if rank is None:
                    choose = platforms.rank_alone if len(forms) == 1 else platforms.rank
                    rank = choose(image.config.platform, platform)
                if rank is None:
                    offered.append(image.config.platform)
                else:
                    ranked.append((rank, image))
            if ranked:
                whole = next(iter(_canonical([name])), str(number))
                named.setdefault(whole, []).append(min(ranked, key=_rank))
        found: list[ArchiveImage] = []
        for ranked in named.values():
            best = min(map(_rank, ranked))
            found += [image for rank, image in ranked if rank == best]
        return found, offered

    def _entries(self) -> Iterator[tuple[str, list[model.Descriptor]]]:
        """The entries of the layout's index: each one's name, and its manifest or those of the indexes below it."""
        count = 0

        def manifests(entry: model.Descriptor, depth: int) -> Iterator[model.Descriptor]:
            nonlocal count
            count += 1
            if depth > _MAX_NESTING or count > _MAX_ENTRIES:
                raise self._files.malformed(f"its index has more than {_MAX_ENTRIES} entries, or is nested too deep")
            if entry.media_type in model.MANIFEST_TYPES:
                yield entry
            elif entry.media_type in model.INDEX_TYPES:
                for each in self._index(self.read_blob(entry.digest)):
                    yield from manifests(each, depth + 1)

        for entry in self._index(self._read_file("index.json")):
            notes = entry.annotations or {}
            name = notes.get(model.ANNOTATION_NAME) or notes.get(model.ANNOTATION_REF_NAME) or ""
            yield name, list(manifests(entry, 0))

    def _index(self, text: bytes) -> list[model.Descriptor]:
        return model.decode(text, model.Index, f"{self._files.label}: the image index").manifests

    def _docker_names(self) -> dict[str, list[str]]:
        """What ``manifest.json`` calls each configuration, by the name of its file."""
        if "manifest.json" not in self._files:
            return {}
        names: dict[str, list[str]] = {}
        for entry in self._docker_entries():
            names.setdefault(entry.config, []).extend(entry.repo_tags or [])
        return names

    def _docker_entries(self) -> list[model.DockerEntry]:
        return model.decode(
            self._read_file("manifest.json"), list[model.DockerEntry], f"{self._files.label}: manifest.json"
        )

    def _read_image(
        self, descriptor: model.Descriptor, name: str, docker_names: dict[str, list[str]]
    ) -> ArchiveImage | None:
        """The image of a manifest; None for what is none, which may lie beside it."""
        if descriptor.digest not in self._known:
            self._known[descriptor.digest] = self._read_contents(descriptor)
        contents = self._known[descriptor.digest]
        if contents is None:
            return None
        if self._find(descriptor.digest).size != descriptor.size:
            raise self._files.malformed(f"{descriptor.digest} has another size than its descriptor says")
        manifest, config, layers = contents
        names = [name, *docker_names.get(f"blobs/{manifest.config.digest.replace(':', '/')}", [])]
        return ArchiveImage(_canonical(names), descriptor, manifest, config, layers)

    def _read_contents(self, descriptor: model.Descriptor) -> _Contents | None:
        """What a manifest leads to; None: it is no image's."""
        manifest = model.decode(
            self.read_blob(descriptor.digest), model.Manifest, f"{self._files.label}: the image's manifest"
        )
        if manifest.is_artifact:
            return None
        config = model.decode(
            self.read_blob(manifest.config.digest), model.ImageConfig, f"{self._files.label}: the image's configuration"
        )
        for blob in (manifest.config, *manifest.layers):
            if self._find(blob.digest).size != blob.size:
                raise self._files.malformed(f"{blob.digest} has another size than its descriptor says")
        for layer in manifest.layers:
            if layer.media_type not in model.LAYER_TYPES:
                raise self._files.malformed(f"layers of type {layer.media_type[:200]!r} can't be unpacked")
        return manifest, config, self._pair(manifest.layers, config.rootfs.diff_ids)

    def _pair(self, layers: Sequence[model.Descriptor], diff_ids: Sequence[str]) -> tuple[Layer, ...]:
        if len(layers) != len(diff_ids):
            raise self._files.malformed(f"its {len(layers)} layers don't fit the {len(diff_ids)} of its configuration")
        # How a layer is packed is read from it: not every containerd knows every name for it, and not every name is true.
        typed = [msgspec.structs.replace(each, media_type=self._layer_type(self._find(each.digest))) for each in layers]
        return tuple(Layer(layer, diff_id) for layer, diff_id in zip(typed, diff_ids, strict=True))

    def _from_docker(self, platform: model.Platform) -> tuple[list[ArchiveImage], list[model.Platform]]:
        offered: list[model.Platform] = []
        found: list[ArchiveImage] = []
        for entry in self._docker_entries():
            content = self._read_file(entry.config)
            config = model.decode(content, model.ImageConfig, f"{self._files.label}: the image's configuration")
            if platforms.rank_alone(config.platform, platform) is None:
                offered.append(config.platform)
            else:
                found.append(self._make_image(entry, content, config))
        return found, offered

    def _make_image(self, entry: model.DockerEntry, content: bytes, config: model.ImageConfig) -> ArchiveImage:
        """A Docker archive's image, with the manifest that it would have in a registry."""
        members = [self._files.find(name) for name in entry.layers or []]
        if len(members) != len(config.rootfs.diff_ids):
            raise self._files.malformed(
                f"its {len(members)} layers don't fit the {len(config.rootfs.diff_ids)} of its configuration"
            )
        descriptors = []
        for member, diff_id in zip(members, config.rootfs.diff_ids, strict=True):
            media_type = self._layer_type(member)
            # An uncompressed layer's digest is its diff ID: it needn't be computed to be known, only checked when read.
            digest = diff_id if media_type == model.OCI_LAYER else self._files.digest(member)
            self._members[digest] = member
            descriptors.append(model.Descriptor(media_type=media_type, digest=digest, size=member.size))
        manifest = model.Manifest(
            schema_version=2,
            media_type=model.OCI_MANIFEST,
            config=self._make(content, model.OCI_CONFIG),
            layers=descriptors,
        )
        descriptor = self._make(model.encode(manifest), model.OCI_MANIFEST)
        layers = self._pair(descriptors, config.rootfs.diff_ids)
        return ArchiveImage(_canonical(entry.repo_tags or []), descriptor, manifest, config, layers)

    def _make(self, content: bytes, media_type: str) -> model.Descriptor:
        digest = model.digest_of(content)
        self._made[digest] = content
        return model.Descriptor(media_type=media_type, digest=digest, size=len(content))

    def _layer_type(self, member: tarball.Member) -> str:
        magic = self._files.read(member, 0, 4)
        if magic.startswith(expand.GZIP_MAGIC):
            return model.OCI_LAYER_GZIP
        return model.OCI_LAYER_ZSTD if magic == expand.ZSTD_MAGIC else model.OCI_LAYER


@contextlib.contextmanager
def open_archive(
    source: str | int,
    *,
    label: str = "",
    scratch_dir: str | None = None,
    piped: bool = False,
    stop: threading.Event | None = None,
) -> Iterator[Archive]:
    """Open an image archive; one that is compressed as a whole is expanded to an unnamed temporary file.

    Args:
        source: A path, or a file that is open for reading and stays the caller's.
        label: What errors call it; the path by default.
        scratch_dir: Where the temporary file goes; the system's directory by default.
        piped: Whether it may be a pipe, which is waited for and copied first.
        stop: Ends all reading early when it is set, but a pipe's copying.

    Raises:
        NotFoundError: There is no such file.
        InvalidArgumentError: It can't be read, is no archive, or is cut short.
        NixletError: There is no room to expand or to copy it, or no right to; as in ``scratch.opened``.
    """
    shown = label or str(source)
    with contextlib.ExitStack() as stack:
        if isinstance(source, str):
            fd = archivepath.opened(source, piped=piped)
            stack.callback(os.close, fd)
        else:
            fd = source
        if piped:
            fd = stack.enter_context(archivefile.regular(fd, shown, scratch_dir))
        if expand.is_compressed(fd):
            fd = stack.enter_context(expand.expanded(fd, shown, scratch_dir, stop))
        yield Archive(tarball.Tarball(fd, shown, stop))


def recorded_names(images: Sequence[ArchiveImage], paths: Sequence[str]) -> list[tuple[str, ...]]:
    """What an archive's images are recorded as, for each image: never nothing.

    An archive's only image that has no name goes by the archive, as if it were pulled; of several each goes by its digest, and so
    does what came through a pipe or from a path that is no reference. Names that are not the image's are left out: with the digest
    of something else (an index that isn't recorded), or of another archive's path, by which that one alone is pulled.

    Args:
        images: All images of the archive that are for this machine.
        paths: The archive's absolute paths, the one that it goes by first; none for a pipe.
    """
    places: list[str] = []
    for path in paths:
        with contextlib.suppress(errors.InvalidArgumentError):
            places.append(reference.canonical(reference.parse_archive(path)))

    def is_own(name: str, image: ArchiveImage) -> bool:
        if reference.is_archive(name):
            return name in places
        return reference.digest_in(name) in {"", image.descriptor.digest}

    def fallback(image: ArchiveImage) -> str:
        return places[0] if places and len(images) == 1 else f"localhost/import@{image.descriptor.digest}"

    return [tuple(name for name in image.names if is_own(name, image)) or (fallback(image),) for image in images]


def _canonical(names: Sequence[str]) -> tuple[str, ...]:
    """Names as containerd records them; what is no reference ("<none>:<none>", a bare tag) names nothing."""
    found: list[str] = []
    for name in names:
        # OCI layouts may have the tag alone: that says nothing without the repository.
        if ":" in name or "/" in name:
            with contextlib.suppress(errors.InvalidArgumentError):
                found.append(reference.canonical(reference.parse(name)))
    return tuple(dict.fromkeys(found))


def _rank(ranked: tuple[int, ArchiveImage]) -> int:
    return ranked[0]


def _merge(images: Sequence[ArchiveImage]) -> tuple[ArchiveImage, ...]:
    """One image for each manifest, with all its names."""
    merged: dict[str, ArchiveImage] = {}
    for image in images:
        known = merged.get(image.descriptor.digest)
        names = (*known.names, *image.names) if known else image.names
        merged[image.descriptor.digest] = dataclasses.replace(image, names=tuple(dict.fromkeys(names)))
    return tuple(merged.values())
