"""What an image's record in containerd leads to: a manifest, or an index with one for each platform."""

import contextlib

import msgspec

from nixlet import errors
from nixlet.containerd import imagestore
from nixlet.images import model, platforms

#: How deep indexes may lie in indexes, and how many entries are looked at in all.
_MAX_NESTING = 4
_MAX_ENTRIES = 1000


async def manifest_of(containerd: imagestore.ImageStore, digest: str, machine: model.Platform) -> model.Manifest:
    """The manifest that containers on a machine are made from, as containerd chooses it.

    Args:
        containerd: Where its content is.
        digest: What the record leads to.
        machine: The machine's platform.

    Raises:
        NotFoundError: Something of it is gone, or it has no form for the machine.
        InvalidArgumentError: Something of it is malformed.
    """
    text = await read_text(containerd, digest)
    if not _is_index(text, digest):
        return model.decode(text, model.Manifest, f"the manifest {digest}")
    entries = await _entries(containerd, text, digest)
    stated = [(platforms.rank(entry.platform, machine), entry) for entry in entries if entry.platform is not None]
    best = [(rank, entry) for rank, entry in stated if rank is not None]
    for _, entry in sorted(best, key=lambda each: each[0]):
        found = await _read(containerd, entry)
        if found is not None:
            return found
    # As containerd does, those that say nothing come last.
    choose = platforms.rank_alone if len(entries) == 1 else platforms.rank
    ranked: list[tuple[int, model.Manifest]] = []
    for entry in entries:
        found = await _read(containerd, entry) if entry.platform is None else None
        if found is not None:
            rank = choose((await read_config(containerd, found)).platform, machine)
            ranked += [] if rank is None else [(rank, found)]
    if not ranked:
        raise errors.NotFoundError(f"the index {digest} has no image for {machine}")
    return min(ranked, key=lambda each: each[0])[1]


async def manifests_of(containerd: imagestore.ImageStore, digest: str) -> list[model.Manifest]:
    """The manifest of that digest, or those of an index that are there; what can't be read is passed over."""
    with contextlib.suppress(errors.NixletError):
        text = await read_text(containerd, digest)
        if not _is_index(text, digest):
            return [model.decode(text, model.Manifest, digest)]
        read = [await _read(containerd, entry) for entry in await _entries(containerd, text, digest)]
        return [found for found in read if found is not None]
    return []


async def read_text(containerd: imagestore.ImageStore, digest: str) -> bytes:
    """A blob that is JSON; of one that is larger than ``model.decode`` takes not much more than that.

    Raises:
        NotFoundError: It is not there.
    """
    return await containerd.read_content(digest, model.MAX_JSON_BYTES + 1)


async def read_config(containerd: imagestore.ImageStore, manifest: model.Manifest) -> model.ImageConfig:
    """The configuration of an image.

    Raises:
        NotFoundError: It is gone.
        InvalidArgumentError: It is malformed.
    """
    digest = manifest.config.digest
    return model.decode(await read_text(containerd, digest), model.ImageConfig, f"the configuration {digest}")


async def _entries(containerd: imagestore.ImageStore, text: bytes, digest: str) -> list[model.Descriptor]:
    """The entries of an index and of those below it."""
    found: list[model.Descriptor] = []
    waiting = [(entry, 1) for entry in model.decode(text, model.Index, f"the index {digest}").manifests]
    for _ in range(_MAX_ENTRIES):
        if not waiting:
            break
        entry, depth = waiting.pop(0)
        if entry.media_type not in model.INDEX_TYPES:
            found.append(entry)
        elif depth < _MAX_NESTING:
            with contextlib.suppress(errors.NotFoundError, errors.InvalidArgumentError):
                inner = await read_text(containerd, entry.digest)
                more = model.decode(inner, model.Index, f"the index {entry.digest}").manifests
                waiting[:0] = [(each, depth + 1) for each in more[:_MAX_ENTRIES]]
    return found


async def _read(containerd: imagestore.ImageStore, entry: model.Descriptor) -> model.Manifest | None:
    """An index's image; None for what is none, or isn't there: those of other platforms are often left out."""
    with contextlib.suppress(errors.NotFoundError, errors.InvalidArgumentError):
        text = await read_text(containerd, entry.digest)
        manifest = model.decode(text, model.Manifest, f"the manifest {entry.digest}")
        return None if manifest.is_artifact else manifest
    return None


class _Either(msgspec.Struct, frozen=True):
    """What tells an index from a manifest; not every maker says a media type."""

    manifests: msgspec.Raw = msgspec.Raw(b"")


def _is_index(text: bytes, digest: str) -> bool:
    return bool(bytes(model.decode(text, _Either, f"the manifest {digest}").manifests))
