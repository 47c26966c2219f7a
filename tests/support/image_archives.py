"""Image archives for tests, made by hand from the formats' specifications: nothing here uses nixlet.images."""

import bz2
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lz4.frame
import zstandard

#: How archives may be compressed, by the ends of their names.
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "lz4": lambda data: lz4.frame.compress(data, content_checksum=True),
    "zst": zstandard.ZstdCompressor(write_checksum=True, write_content_size=False).compress,
}

OCI = "application/vnd.oci.image"
Files = dict[str, bytes]


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def blob(data: bytes) -> str:
    """The place of a blob in an OCI layout."""
    return f"blobs/{digest(data).replace(':', '/')}"


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def tar(
    files: Mapping[str, bytes] | Iterable[tuple[str, bytes]],
    *,
    links: Iterable[tarfile.TarInfo] = (),
    form: int = tarfile.PAX_FORMAT,
) -> bytes:
    """A tar file; pairs may repeat a name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for info in links:
            out.addfile(info)
        for name, data in files.items() if isinstance(files, Mapping) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def descriptor(media_type: str, data: bytes, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **more}


def config_json(diff_ids: Iterable[str], **more: Any) -> bytes:
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": list(diff_ids)}}
    return json.dumps({**config, **more}).encode()


def image(
    layers: Iterable[bytes], *, annotations: Iterable[dict[str, str] | None] = (), **config: Any
) -> tuple[bytes, Files]:
    """An image of gzip'ed layers: its manifest, and all its blobs by their places."""
    layers = list(layers)
    packed = [gzip.compress(layer, mtime=0) for layer in layers]
    content = config_json([digest(layer) for layer in layers], **config)
    described = [descriptor(f"{OCI}.layer.v1.tar+gzip", layer) for layer in packed]
    for one, notes in zip(described, annotations, strict=False):
        if notes is not None:
            one["annotations"] = notes
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": f"{OCI}.manifest.v1+json",
            "config": descriptor(f"{OCI}.config.v1+json", content),
            "layers": described,
        }
    ).encode()
    return manifest, {blob(data): data for data in (manifest, content, *packed)}


def index_json(*entries: dict[str, Any]) -> bytes:
    return json.dumps(
        {"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": list(entries), "annotations": None}
    ).encode()


def entry(manifest: bytes, name: str | None = None, **more: Any) -> dict[str, Any]:
    """An index's entry for a manifest."""
    if name is not None:
        more["annotations"] = {"io.containerd.image.name": name}
    return descriptor(f"{OCI}.manifest.v1+json", manifest, **more)


def oci(layers: Iterable[bytes] = (b"a layer",), *, name: str | None = "docker.io/library/a:1", **config: Any) -> Files:
    """The files of an OCI layout with one image."""
    manifest, blobs = image(layers, **config)
    return {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": index_json(entry(manifest, name)), **blobs}


def docker(layers: Mapping[str, bytes], *, tags: list[str] | None = None, **config: Any) -> Files:
    """The files of a Docker archive; layers by the names of their files."""
    plain = [gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data for data in layers.values()]
    content = config_json([digest(data) for data in plain], **config)
    manifest = [{"Config": "config.json", "RepoTags": tags, "Layers": list(layers)}]
    return {"config.json": content, "manifest.json": json.dumps(manifest).encode(), **layers}
