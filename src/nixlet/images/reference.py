"""References to images, as people and kubelets write them.

``nix:0/<path>`` names an image archive on the node, in the store or elsewhere. Everything else is an ordinary reference, by the
grammar of the distribution project's reference package, with Docker's short forms.
"""

import dataclasses
import re

from nixlet import errors
from nixlet.store import paths

NIX_PREFIX = "nix:0"

#: What is meant as such a prefix: a registry's name has a number behind the colon.
_WITHOUT_ZERO = "nix:/"

_DEFAULT_DOMAIN = "docker.io"
_MAX_NAME = 255
_MAX_PATH = 4096

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?", re.ASCII)
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True)
class ArchiveReference:
    """An image archive on the node.

    Attributes:
        path: Its absolute path, normalised.
        store_path: The same as a store path when it lies in the store, else None.
    """

    path: str
    store_path: paths.StorePath | None

    def __str__(self) -> str:
        """The name that containerd records."""
        return f"{NIX_PREFIX}{self.path}:latest"


@dataclasses.dataclass(frozen=True, slots=True)
class ImageReference:
    """An image in a registry, or in containerd's image store under a registry's name.

    Attributes:
        domain: The registry: "docker.io", "localhost:5000".
        repository: "library/busybox".
        tag: Or None beside a digest.
        digest: "sha256:…", or None.
    """

    domain: str
    repository: str
    tag: str | None
    digest: str | None

    def __str__(self) -> str:
        """The name that containerd records: a digest makes the tag superfluous."""
        return f"{self.domain}/{self.repository}{f'@{self.digest}' if self.digest else f':{self.tag}'}"


Reference = ArchiveReference | ImageReference


def parse(text: str, store_dir: str = paths.DEFAULT_STORE_DIR) -> Reference:
    """Read a reference; "latest" stands in for a missing tag.

    Raises:
        InvalidArgumentError: It fits neither grammar, or a path in the store is no store path.
    """
    if text.startswith(_WITHOUT_ZERO):
        meant = NIX_PREFIX + text.removeprefix("nix:")
        raise errors.InvalidArgumentError(
            f"{paths.shown(text)} is not an image reference: its 0 is missing", hint=f"write {paths.shown(meant)}"
        )
    if is_archive(text):
        return parse_archive(text.removeprefix(NIX_PREFIX), store_dir)
    return _parse_image(text)


def canonical(reference: Reference) -> str:
    """The name that containerd records: "nix:0/nix/store/….tar:latest", "docker.io/library/busybox:latest"."""
    return str(reference)


def parse_archive(path: str, store_dir: str = paths.DEFAULT_STORE_DIR) -> ArchiveReference:
    """Read what follows ``nix:0``: an absolute path, and perhaps ":latest", which clients add.

    Raises:
        InvalidArgumentError: The path is not absolute and normalised, has another tag, or leads to something in the store
            that is no store path.
    """
    path = path.removesuffix(":latest")
    shown = paths.shown(f"{NIX_PREFIX}{path}")
    if not path.startswith("/") or path == "/":
        raise errors.InvalidArgumentError(
            f"{shown} is not an image reference: an absolute path must follow {NIX_PREFIX}",
            hint=f"write {NIX_PREFIX}{store_dir}/<hash>-nix-image-<name>.tar",
        )
    head, colon, tag = path.rpartition(":")
    if colon and "/" not in tag:
        raise errors.InvalidArgumentError(
            f"{shown} is not an image reference: {NIX_PREFIX} references have no tag but latest",
            hint=f"write {paths.shown(NIX_PREFIX + head)}; a path with a ':' in its last part can't be named",
        )
    segments = path[1:].split("/")
    if len(path) > _MAX_PATH or not path.isprintable() or any(part in {"", ".", ".."} for part in segments):
        raise errors.InvalidArgumentError(
            f"{shown} is not an image reference: the path must be without '.', '..', '//' and control characters",
            hint="write the whole path of the archive",
        )
    in_store = path == store_dir or path.startswith(f"{store_dir}/")
    return ArchiveReference(path, paths.parse(path, store_dir) if in_store else None)


def digest_in(name: str) -> str:
    """The digest in a name as containerd records it; an empty string for a name without."""
    return "" if is_archive(name) else name.partition("@")[2]


def is_known_to_registries(name: str) -> bool:
    """Whether a name as containerd records it fits a registry's grammar, without which CRI can't find it."""
    try:
        _parse_image(name)
    except errors.InvalidArgumentError:
        return False
    return True


def _parse_image(text: str) -> ImageReference:
    name, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise _malformed(text, "its digest is not sha256: and 64 hexadecimal digits")
    tag: str | None = None
    head, colon, last = name.rpartition(":")
    if colon and "/" not in last:
        name, tag = head, last
        if not _TAG.fullmatch(tag):
            raise _malformed(text, "its tag has other characters than letters, digits, '_', '.', '-', or is too long")
    domain, repository = _split_domain(name)
    if not _DOMAIN.fullmatch(domain):
        raise _malformed(text, f"{paths.shown(domain)} is no registry's name")
    if not _REPOSITORY.fullmatch(repository):
        raise _malformed(
            text, "a repository's name has lower-case letters, digits, and single separators '.', '_', '-', '/'"
        )
    if len(domain) + 1 + len(repository) > _MAX_NAME:
        raise _malformed(text, f"its name is longer than {_MAX_NAME} characters")
    if not at and re.fullmatch(r"[0-9a-f]{64}", text):
        raise _malformed(text, "64 hexadecimal digits alone are an image's identifier")
    return ImageReference(domain, repository, tag or (None if at else "latest"), digest if at else None)


def _split_domain(name: str) -> tuple[str, str]:
    """A first part is a registry if it looks like a host: it has a dot or a port, is localhost, or has capitals."""
    first, slash, rest = name.partition("/")
    if not slash or not (any(sign in first for sign in ".:") or first == "localhost" or first != first.lower()):
        domain, repository = _DEFAULT_DOMAIN, name
    else:
        domain, repository = first, rest
    if domain == "index.docker.io":
        domain = _DEFAULT_DOMAIN
    if domain == _DEFAULT_DOMAIN and "/" not in repository:
        repository = f"library/{repository}"
    return domain, repository


def _malformed(text: str, why: str) -> errors.InvalidArgumentError:
    return errors.InvalidArgumentError(
        f"{paths.shown(text)} is not an image reference: {why}",
        hint="write [REGISTRY/]NAME[:TAG][@DIGEST] or nix:0/nix/store/<hash>-nix-image-<name>.tar",
    )


def is_archive(text: str) -> bool:
    """Whether a reference, well-formed or not, is meant as that of an archive on the node."""
    return text == NIX_PREFIX or text.startswith((f"{NIX_PREFIX}/", f"{NIX_PREFIX}:", f"{NIX_PREFIX}@", _WITHOUT_ZERO))
