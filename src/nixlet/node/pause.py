"""The image that holds a pod's namespaces: one static program, packed by nixlet itself, so that no registry is asked for it."""

import contextlib
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator

from nixlet.images import model, platforms

#: The name under which containerd's configuration knows it.
REFERENCE = "localhost/nixlet/pause:1"

#: catatonit(1) with -P waits for signals and reaps what is left to it, which is all that a pod's first process has to do.
_ENTRYPOINT = ["/pause", "-P"]


def _tar(files: list[tuple[str, bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content, mode in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), mode
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@contextlib.contextmanager
def image_archive(program: str, directory: str) -> Iterator[str]:
    """An archive of the image, in a temporary file for the time of the context.

    Args:
        program: The static program.
        directory: Where the file goes.
    """
    with open(program, "rb") as file:
        layer = _tar([("pause", file.read(), 0o555)])
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
    fd, path = tempfile.mkstemp(prefix=".pause-", dir=directory)
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(_tar(blobs))
        yield path
    finally:
        os.unlink(path)
