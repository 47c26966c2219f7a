"""One manifest's way into the cluster, and what it made before and no longer names out of it.

Each object gets a label that says which manifest made it, and a record in the cluster lists them. The record is written before what it
lists is made: whatever is cut off in the middle, nothing is forgotten. Something is deleted only when all of the manifest was
applied, its record lists it, it still has the label, it is none of what was just applied, by the number that the API server gave it, and no
other manifest names it.
"""

import logging
from collections.abc import Collection, Sequence
from typing import NamedTuple

from nixlet import errors
from nixlet.node.manifests import directory, kubectl, objects

#: What other objects need first, by kind and group.
_FIRST = frozenset((("Namespace", ""), ("CustomResourceDefinition", "apiextensions.k8s.io")))

#: How often an object is looked at that another one has taken the place of while it was deleted.
_TRIES = 3

_log = logging.getLogger("nixlet.manifests")


class Applied(NamedTuple):
    """A manifest that was applied whole.

    Attributes:
        manifest: Its name.
        record: What the cluster's record lists now.
        living: What it names, as the API server has it.
    """

    manifest: str
    record: objects.Record
    living: tuple[objects.Living, ...]

    @property
    def leaves_something(self) -> bool:
        """Whether it made something before that it no longer names, as it seems."""
        named = objects.Named(each.which for each in self.living)
        return any(each not in named for each in self.record.objects)


async def apply(
    through: kubectl.Kubectl, manifest: str, written: Sequence[objects.Written], known: objects.Record | None
) -> Applied:
    """Have the cluster hold what a manifest names; nothing is deleted yet.

    Args:
        through: kubectl.
        manifest: The manifest's name.
        written: What it names, with its label.
        known: What the cluster's record lists.

    Raises:
        UnavailableError: The API server doesn't answer.
        CommandFailedError: Some of it is refused; the rest is applied.
    """
    label = directory.label(manifest)
    listed = known.objects if known is not None else frozenset()
    record = objects.Record(manifest, listed | {each.which for each in written})
    if record != known:
        await through.write_record(record, label)
    living: list[objects.Living] = []
    refused: list[errors.CommandFailedError] = []
    for part in _parts(written):
        try:
            living += await through.apply(part, manifest)
        except errors.CommandFailedError as error:
            refused.append(error)
        definitions = [each.which for each in part if each.which.kind == "CustomResourceDefinition"]
        if definitions and len(part) < len(written):
            await through.established(definitions)
    if refused:
        raise refused[0]
    return Applied(manifest, record, tuple(living))


async def prune(through: kubectl.Kubectl, applied: Applied, elsewhere: objects.Named) -> None:
    """Delete what a manifest made and no longer names, and have the record list what is still its own.

    Args:
        through: kubectl.
        applied: The manifest.
        elsewhere: What other manifests name, which stays: they have it now, or will.

    Raises:
        NixletError: Something can't be deleted; the record still lists it.
    """
    label = directory.label(applied.manifest)
    named = {each.which for each in applied.living}
    kept = frozenset(each.uid for each in applied.living)
    unnamed = applied.record.objects - named
    doomed = {each for each in unnamed if each not in elsewhere}
    await _delete(through, applied.manifest, doomed, kept)
    own = frozenset(named | (unnamed - doomed))
    if applied.record.objects != own:
        await through.write_record(objects.Record(applied.manifest, own), label)


async def withdraw(through: kubectl.Kubectl, record: objects.Record) -> None:
    """Delete all that a manifest made, and the record.

    Raises:
        NixletError: Something can't be deleted; the record still lists it.
    """
    await _delete(through, record.manifest, record.objects, frozenset())
    await through.delete_record(directory.label(record.manifest))


async def _delete(
    through: kubectl.Kubectl, manifest: str, doomed: Collection[objects.Object], kept: frozenset[str]
) -> None:
    label = directory.label(manifest)
    # What other objects need goes last.
    for which in sorted(doomed, key=lambda each: ((each.kind, each.group) in _FIRST, each)):
        for _ in range(_TRIES):
            owned = await through.owner(which)
            if owned is None or owned.uid in kept or owned.label != label:
                break
            if await through.delete(which, owned):
                _log.info("%s names %s no longer: deleted", manifest, which)
                break
        else:
            raise errors.FailedPreconditionError(f"{which} can't be deleted: another one takes its place each time")


def _parts(written: Sequence[objects.Written]) -> list[list[objects.Written]]:
    """The objects in the order in which they can be made; secrets by themselves, since what is said of them is not handed on."""
    first = [each for each in written if (each.which.kind, each.which.group) in _FIRST]
    secrets = [each for each in written if kubectl.is_secret(each.which)]
    rest = [each for each in written if each not in first and each not in secrets]
    return [part for part in (first, secrets, rest) if part]
