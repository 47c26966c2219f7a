"""The image that holds a pod's namespaces: one static program, packed by nixlet itself, so that no registry is asked for it."""

import contextlib
import io
import struct
import tarfile
import tempfile
from collections.abc import Iterator

from nixlet import errors
from nixlet.host import files
from nixlet.images import model, platforms

#: The name under which containerd's configuration knows it.
REFERENCE = "localhost/nixlet/pause:1"

#: catatonit(1) with -P waits for signals and reaps what is left to it, which is all that a pod's first process has to do.
_ENTRYPOINT = ["/pause", "-P"]

#: A program header that names a program's loader (elf(5)), which wouldn't be in the image.
_PT_INTERP = 3

#: By an ELF file's class (32 or 64 bits): how its header ends, from e_phoff on: e_phoff, e_phentsize, e_phnum; and at which byte.
_HEADERS = {1: ("I10xHH", 28), 2: ("Q14xHH", 32)}


def _tar(files: list[tuple[str, bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content, mode in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def is_static(content: bytes) -> bool:
    """Whether a program runs without a loader and libraries (elf(5))."""
    if content[:4] != b"\x7fELF":
        return False
    try:
        fields, place = _HEADERS[content[4]]
        order = ">" if content[5] == 2 else "<"
        start, size, count = struct.unpack_from(order + fields, content, place)
        kinds = [struct.unpack_from(f"{order}I", content, start + number * size)[0] for number in range(count)]
    except (IndexError, KeyError, struct.error):
        return False
    return _PT_INTERP not in kinds


def read_static(program: str) -> bytes:
    """A program that can be alone in an image.

    Raises:
        UnsupportedError: It can't: it needs a loader and libraries, or is none.
    """
    with open(program, "rb") as file:
        content = file.read()
    if not is_static(content):
        raise errors.UnsupportedError(
            f"{program} can't hold a pod's namespaces: it is no statically linked program, and its image has nothing else",
            hint="install catatonit (Debian: apt install catatonit), or name another static program: --pause",
        )
    return content


@contextlib.contextmanager
def image_archive(program: str, directory: str) -> Iterator[int]:
    """An archive of the image, open for the time of the context: a file without a name, of which nothing stays whoever is killed.

    Args:
        program: The static program.
        directory: Where the file goes.

    Raises:
        UnsupportedError: The program is not static.
        FailedPreconditionError: The file can't be written.
    """
    content = read_static(program)
    layer = _tar([("pause", content, 0o555)])
    platform = platforms.host_platform()
    config = model.ImageConfig(
        architecture=platform.architecture,
        os=platform.os,
        config=model.ContainerConfig(entrypoint=_ENTRYPOINT),
        rootfs=model.RootFS(type="layers", diff_ids=[model.digest_of(layer)]),
    )
    blobs: list[tuple[str, bytes, int]] = []

    def put(content: bytes, media_type: str) -> model.Descriptor:
        digest = model.digest_of(content)
        blobs.append((f"blobs/{digest.replace(':', '/')}", content, 0o444))
        return model.Descriptor(media_type=media_type, digest=digest, size=len(content))

    manifest = model.Manifest(
        schema_version=2,
        media_type=model.OCI_MANIFEST,
        config=put(model.encode(config), model.OCI_CONFIG),
        layers=[put(layer, model.OCI_LAYER)],
    )
    index = model.Index(manifests=[put(model.encode(manifest), model.OCI_MANIFEST)])
    blobs += [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}', 0o444), ("index.json", model.encode(index), 0o444)]
    with contextlib.ExitStack() as stack:
        try:
            out = stack.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0))
            files.write_whole(out.fileno(), _tar(blobs))
        except OSError as error:
            raise files.refused(f"the archive of the pause image can't be written to {directory}", error) from error
        yield out.fileno()
