"""OCI images as values: index, manifest, descriptor, configuration (OCI image specification 1.1; Docker schema 2 reads alike).

Reading tolerates fields that nixlet doesn't know, and nulls, which Go programs write for what is empty. Writing keeps the
specification's order of fields, so that equal values give equal bytes.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, TypeVar

import msgspec

from nixlet import errors
from nixlet.encoding import unreadable

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"

INDEX_TYPES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFEST_TYPES = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIG_TYPES = frozenset({OCI_CONFIG, DOCKER_CONFIG, ""})

#: What the types of all kinds of layers begin with, also of those that can't be unpacked (encrypted ones).
_LAYER_FAMILIES = ("application/vnd.oci.image.layer.", "application/vnd.docker.image.rootfs.")

#: Layers that can be unpacked. Those that registries must not hand on are layers like others when they are there.
LAYER_TYPES = frozenset(
    {
        *(OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD),
        *(f"application/vnd.oci.image.layer.nondistributable.v1.tar{end}" for end in ("", "+gzip", "+zstd")),
        *(f"application/vnd.docker.image.rootfs.diff.tar{end}" for end in ("", ".gzip", ".zstd")),
        *(f"application/vnd.docker.image.rootfs.foreign.diff.tar{end}" for end in ("", ".gzip")),
    }
)

#: Annotations of an index's descriptors: the whole reference (containerd's), and the tag alone.
ANNOTATION_NAME = "io.containerd.image.name"
ANNOTATION_REF_NAME = "org.opencontainers.image.ref.name"

#: What registries and containerd accept for a manifest, an index or a configuration, in bytes.
MAX_JSON_BYTES = 4 * 1024 * 1024

#: "sha256:" and 64 lower-case hexadecimal digits.
Digest = Annotated[str, msgspec.Meta(pattern=r"\Asha256:[0-9a-f]{64}\Z")]
Size = Annotated[int, msgspec.Meta(ge=0)]
Flags = dict[str, dict[str, object] | None]

#: Fields that are sets of names: objects whose values say nothing.
_SETS = frozenset({"ExposedPorts", "Volumes"})

_T = TypeVar("_T")


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an image runs on, in Go's names.

    Attributes:
        architecture: "amd64", "arm64", …
        os: "linux", …
        variant: Of the processor ("v7"), or an empty string.
    """

    architecture: str = ""
    os: str = ""
    variant: str | None = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True):
    """Content by its digest; sizes are in bytes."""

    media_type: str = ""
    digest: Digest
    size: Size
    urls: list[str] | None = None
    annotations: dict[str, str] | None = None
    platform: Platform | None = None


class Index(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A list of images, or of one image's forms for several platforms."""

    schema_version: Annotated[int, msgspec.Meta(ge=2, le=2)] = 2
    media_type: str = OCI_INDEX
    manifests: list[Descriptor] = []


class Manifest(msgspec.Struct, frozen=True, omit_defaults=True, rename="camel", kw_only=True):
    """One image for one platform: its configuration and its layers, the lowest first; or an artifact."""

    schema_version: Annotated[int, msgspec.Meta(ge=2, le=2)]
    media_type: str = ""
    config: Descriptor
    layers: list[Descriptor] = []
    annotations: dict[str, str] | None = None

    @property
    def is_artifact(self) -> bool:
        """Whether it holds something else than an image: a signature or a chart, for example."""
        types = [layer.media_type for layer in self.layers]
        # Signatures have an image's configuration, but no layers of an image.
        is_foreign = bool(types) and not any(each.startswith(_LAYER_FAMILIES) for each in types)
        return self.config.media_type not in CONFIG_TYPES or is_foreign


class ContainerConfig(msgspec.Struct, frozen=True, omit_defaults=True, rename="pascal", kw_only=True):
    """How a container of the image runs; None is "not said". The last four fields are Docker's."""

    user: str | None = None
    exposed_ports: Flags | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    volumes: Flags | None = None
    working_dir: str | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None
    args_escaped: bool | None = None
    healthcheck: dict[str, object] | None = None
    shell: list[str] | None = None
    on_build: list[str] | None = None


class RootFS(msgspec.Struct, frozen=True):
    """The layers as they are unpacked: digests of the uncompressed archives."""

    type: str = "layers"
    diff_ids: list[Digest] = []


class ImageConfig(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """An image's configuration; its digest is the image's identity."""

    created: str | None = None
    author: str | None = None
    architecture: str = ""
    os: str = ""
    variant: str | None = None
    config: ContainerConfig | None = None
    rootfs: RootFS = RootFS()

    @property
    def platform(self) -> Platform:
        """What the image runs on."""
        return Platform(self.architecture, self.os, self.variant or "")


class DockerEntry(msgspec.Struct, frozen=True, rename="pascal", kw_only=True):
    """An entry of a Docker archive's ``manifest.json``: names of members of the archive."""

    config: str
    repo_tags: list[str] | None = None
    layers: list[str] | None = None


def decode(data: bytes, kind: type[_T], what: str) -> _T:
    """Read a value from JSON; ``what`` names it in the sentence of an error.

    Raises:
        InvalidArgumentError: It is too large, no JSON, or of another form.
    """
    if len(data) > MAX_JSON_BYTES:
        raise errors.InvalidArgumentError(f"{what} is larger than {MAX_JSON_BYTES} bytes")
    try:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError:
            if b"null" not in data:
                raise
            return msgspec.convert(_without_nulls(msgspec.json.decode(data)), kind)
    except unreadable.JSON as error:
        raise errors.InvalidArgumentError(f"{what} is malformed: {error}") from error


def _without_nulls(value: object) -> object:
    """JSON as Go reads it: a field that is null might as well not be there. In sets of names a null means nothing."""
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    if isinstance(value, dict):
        return {key: each if key in _SETS else _without_nulls(each) for key, each in value.items() if each is not None}
    return value


def encode(value: msgspec.Struct) -> bytes:
    """JSON, indented by two spaces: what a manifest's and a configuration's digest is made of."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2)


def digest_of(data: bytes) -> str:
    """The digest of some content."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def chain_ids(diff_ids: Sequence[str]) -> tuple[str, ...]:
    """The names of stacks of layers, the lowest first (image specification, "Layer ChainID")."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return tuple(chain)
