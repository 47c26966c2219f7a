"""Building Nix images: an archive that names a closure, and holds next to nothing itself.

The archive is an OCI image layout and a Docker archive at once, and the same bytes for the same inputs: it can be the output of a
Nix derivation.
"""

import contextlib
import dataclasses
import io
import os
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO

import msgspec

from nixlet import errors
from nixlet.host import files
from nixlet.images import archive, layers, model, platforms, reference
from nixlet.store import closures, paths

#: Lists of store paths and configurations are small; in bytes.
_MAX_INPUT_BYTES = closures.MAX_LIST_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class BuildRequest:
    """What an image is made of.

    Attributes:
        config: How its containers run.
        closure: The store paths that containers see, in the order of the list.
        closure_info: The store path that lists the closure, or None to list it in the image itself (the older form).
        copy_to_root: Store paths whose files appear below /.
        from_image: The archive of an image to build upon, or None.
        name: The image's reference; None names it after the archive, for ``nix:0``.
        platform: What it runs on; with a base image, which of its forms is taken.
    """

    config: model.ContainerConfig
    closure: tuple[paths.StorePath, ...]
    closure_info: paths.StorePath | None = None
    copy_to_root: tuple[paths.StorePath, ...] = ()
    from_image: str | None = None
    name: reference.Reference | None = None
    platform: model.Platform = dataclasses.field(default_factory=platforms.host_platform)


@dataclasses.dataclass(frozen=True, slots=True)
class BuiltImage:
    """An image that was built: its name as containerd records it, and its manifest's and configuration's digests."""

    name: str
    digest: str
    config_digest: str


def read_request(
    *,
    config: str,
    closure: str,
    copy_to_root: str | None = None,
    closure_info: str | None = None,
    from_image: str | None = None,
    ref: str | None = None,
    architecture: str | None = None,
    store_dir: str = paths.DEFAULT_STORE_DIR,
) -> BuildRequest:
    """Make a request of files, as ``nixlet image build`` and Nix derivations have them.

    Args:
        config: The "config" object of an OCI image configuration, as JSON or as a file of it; names of fields in any case,
            unknown ones ignored.
        closure: A file of store paths, one a line.
        copy_to_root: A list of store paths, as JSON or as a file of it.
        closure_info: The closureInfo that lists the closure. Left out, it is the directory of ``closure``, when that is a
            store path and the file's name is ``store-paths``.
        from_image: An image archive.
        ref: The image's name.
        architecture: In Go's names; this machine's by default.
        store_dir: The store that all the paths are of.

    Raises:
        NotFoundError: A file does not exist.
        InvalidArgumentError: A file's content, a path or the name is malformed.
    """
    listed = closures.parse_store_paths(_read(closure), store_dir)
    directory, _, name = os.path.abspath(closure).rpartition("/")
    if closure_info is None and name == closures.STORE_PATHS_FILE and os.path.dirname(directory) == store_dir:
        closure_info = directory
    roots: list[str] = []
    if copy_to_root:
        content, what = _json(copy_to_root, "copy-to-root")
        roots = model.decode(content, list[str], what)
    return BuildRequest(
        config=parse_config(*_json(config, "config")),
        closure=listed,
        closure_info=paths.parse(closure_info, store_dir) if closure_info else None,
        copy_to_root=tuple(paths.parse(root, store_dir) for root in roots),
        from_image=from_image,
        name=reference.parse(ref, store_dir) if ref else None,
        platform=model.Platform(architecture, "linux") if architecture else platforms.host_platform(),
    )


def parse_config(data: bytes, what: str) -> model.ContainerConfig:
    """Read the configuration that a person wrote: fields' names in any case, as tools written in Go take them.

    Raises:
        InvalidArgumentError: It is no JSON object, or a field has another type.
    """
    known = {field.encode_name.lower(): field.encode_name for field in msgspec.structs.fields(model.ContainerConfig)}
    written = model.decode(data, dict[str, object], what)
    fields = {known[name.lower()]: value for name, value in written.items() if name.lower() in known}
    return model.decode(msgspec.json.encode(fields), model.ContainerConfig, what)


def build_image(request: BuildRequest, output: str) -> BuiltImage:
    """Build an image into an archive; the file appears whole, or not at all.

    Raises:
        NotFoundError: A store path, or the base image, does not exist.
        InvalidArgumentError: The base image is malformed or for another platform; what goes to the root conflicts.
        FailedPreconditionError: The archive's place is taken by what is no file.
        NixletError: The archive can't be written, as in ``files.refused``.
    """
    output = os.path.abspath(output)
    target = _place(output)
    name = reference.canonical(request.name or reference.parse(f"{reference.NIX_PREFIX}{output}"))
    layer = layers.render(layers.plan(request.closure, request.copy_to_root))
    with contextlib.ExitStack() as stack:
        blobs: dict[str, tuple[int, IO[bytes] | io.BufferedIOBase]] = {}
        base = None
        if request.from_image is not None:
            source = stack.enter_context(archive.open_archive(request.from_image))
            base = source.image(request.platform)
            for each in base.layers:
                if each.descriptor.digest not in blobs:
                    content = stack.enter_context(source.open_blob(each.descriptor.digest))
                    blobs[each.descriptor.digest] = (each.descriptor.size, content)

        def add(content: bytes, media_type: str, annotations: dict[str, str] | None = None) -> model.Descriptor:
            digest = model.digest_of(content)
            blobs[digest] = (len(content), io.BytesIO(content))
            return model.Descriptor(media_type=media_type, digest=digest, size=len(content), annotations=annotations)

        notes = closures.ClosureReference(request.closure_info, () if request.closure_info else request.closure)
        new_layer = add(layer.content, model.OCI_LAYER_GZIP, notes.annotations())
        config = add(model.encode(_image_config(request, base, layer.diff_id)), model.OCI_CONFIG)
        manifest = model.Manifest(
            schema_version=2,
            media_type=model.OCI_MANIFEST,
            config=config,
            layers=[*_base_layers(base), new_layer],
        )
        top = add(model.encode(manifest), model.OCI_MANIFEST)
        _write(target, {**_blob_files(blobs), **_index_files(name, top, manifest)})
    return BuiltImage(name, top.digest, config.digest)


def _base_layers(base: archive.ArchiveImage | None) -> list[model.Descriptor]:
    """The base's layers, with their annotations (they may name closures) and OCI's names for what they are."""
    return [msgspec.structs.replace(each.descriptor, urls=None) for each in (base.layers if base else ())]


def _image_config(request: BuildRequest, base: archive.ArchiveImage | None, diff_id: str) -> model.ImageConfig:
    inherited = base.config.config if base else None
    return model.ImageConfig(
        architecture=request.platform.architecture,
        os=request.platform.os,
        variant=_variant(request.platform, base) or None,
        config=merge_configs(inherited, request.config) if inherited else request.config,
        rootfs=model.RootFS("layers", [*(base.config.rootfs.diff_ids if base else ()), diff_id]),
    )


def _variant(platform: model.Platform, base: archive.ArchiveImage | None) -> str | None:
    """A base for the same processor may ask for a newer one; a base for another processor says nothing of ours."""
    if base is not None and base.config.architecture == platform.architecture:
        return base.config.variant
    return platform.variant


def merge_configs(base: model.ContainerConfig, own: model.ContainerConfig) -> model.ContainerConfig:
    """A base image's configuration with another's on top.

    Environment variables are overridden by name and appended; ports, volumes and labels are joined; all else is taken from
    ``own`` where it says something. What belongs to the base alone is left out, as Docker does: arguments that were meant for
    another entrypoint, and triggers for builds upon it.
    """
    fields = {name: value for name, value in msgspec.structs.asdict(own).items() if value is not None}
    if own.entrypoint is not None:
        fields["cmd"], fields["args_escaped"] = own.cmd, own.args_escaped
    fields["on_build"] = own.on_build
    for name in ("exposed_ports", "volumes", "labels"):
        joined = {**(getattr(base, name) or {}), **(getattr(own, name) or {})}
        fields[name] = joined or None
    environment = {line.partition("=")[0]: line for line in (*(base.env or ()), *(own.env or ()))}
    fields["env"] = list(environment.values()) or None
    return msgspec.structs.replace(base, **fields)


def _index_files(name: str, top: model.Descriptor, manifest: model.Manifest) -> dict[str, tuple[int, int, IO[bytes]]]:
    notes = {model.ANNOTATION_NAME: name}
    tag = name.rpartition(":")[2]
    if "@" not in name:
        notes[model.ANNOTATION_REF_NAME] = tag
    index = model.Index(manifests=[msgspec.structs.replace(top, annotations=notes)])
    entry = model.DockerEntry(
        config=_blob_name(manifest.config.digest),
        repo_tags=None if "@" in name else [name],
        layers=[_blob_name(layer.digest) for layer in manifest.layers],
    )
    contents = {
        "index.json": (0o644, msgspec.json.encode(index)),
        "manifest.json": (0o644, msgspec.json.encode([entry])),
        "oci-layout": (0o444, b'{"imageLayoutVersion":"1.0.0"}'),
    }
    return {file: (mode, len(data), io.BytesIO(data)) for file, (mode, data) in contents.items()}


def _blob_files(
    blobs: Mapping[str, tuple[int, IO[bytes] | io.BufferedIOBase]],
) -> dict[str, tuple[int, int, IO[bytes] | io.BufferedIOBase]]:
    return {_blob_name(digest): (0o444, size, content) for digest, (size, content) in sorted(blobs.items())}


def _blob_name(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _place(output: str) -> str:
    """Where the archive's file goes: a link stays, and the file that it leads to is replaced.

    Raises:
        FailedPreconditionError: Something is there that is no file, and must not be replaced by one.
    """
    target = os.path.realpath(output)
    with files.refusing(f"can't look at {target}"), contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise errors.FailedPreconditionError(
                f"can't write the image archive {output}: what is there is no file",
                hint="name a file, or what isn't there yet",
            )
    return target


def _write(output: str, members: Mapping[str, tuple[int, int, IO[bytes] | io.BufferedIOBase]]) -> None:
    """Write the tar file: the directories, then the files in the order given."""
    with _replacing(output) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for directory in ("blobs", "blobs/sha256"):
            info = tarfile.TarInfo(directory)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)
        for name, (mode, size, content) in members.items():
            info = tarfile.TarInfo(name)
            info.mode, info.size = mode, size
            tar.addfile(info, content)


@contextlib.contextmanager
def _replacing(output: str) -> Iterator[IO[bytes]]:
    """A file that takes the output's place when all went well."""
    temporary = None
    try:
        # What is read meanwhile, of a base image for example, has errors of its own.
        with files.refusing(f"can't write the image archive {output}"):
            fd, temporary = tempfile.mkstemp(dir=os.path.dirname(output), prefix=".nixlet-image-")
            with os.fdopen(fd, "wb") as file:
                yield file
                os.fchmod(file.fileno(), 0o644)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, output)
            temporary = None
            files.sync_directory(os.path.dirname(output))
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _json(given: str, name: str) -> tuple[bytes, str]:
    """What a person gave as JSON, or as a file of it; and what errors call it."""
    if given.lstrip().startswith(("{", "[")):
        return os.fsencode(given), f"what is given as {name}"
    return _read(given, hint="give a file, or JSON itself, which begins with { or ["), given


def _read(path: str, *, hint: str = "") -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_INPUT_BYTES + 1)
    except FileNotFoundError as error:
        raise errors.NotFoundError(f"there is no file {path}", hint=hint) from error
    except OSError as error:
        raise errors.InvalidArgumentError(f"can't read {path}: {error.strerror}") from error
    if len(data) > _MAX_INPUT_BYTES:
        raise errors.InvalidArgumentError(f"{path} is larger than {_MAX_INPUT_BYTES} bytes")
    return data
