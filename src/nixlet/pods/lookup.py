"""Containers by what people call them."""

import re
from collections.abc import Sequence

from nixlet import errors
from nixlet.pods import criconfig
from nixlet.rpc.gen import cri_pb2

#: What an ID may begin with; containerd's are of such digits.
_ID_PREFIX = re.compile(r"[0-9a-f]+")


def find(wanted: str, containers: Sequence[cri_pb2.Container]) -> cri_pb2.Container:
    """The container that a person means.

    A name goes before the beginning of an ID: "db" and "f5" are names that people give, and either can begin an ID.

    Args:
        wanted: An ID; a name; "pod/name", also with the namespace in front; a pod's name; or the beginning of an ID.
        containers: All that are there.

    Raises:
        NotFoundError: None is called so.
        InvalidArgumentError: Several are.
    """

    def named(each: cri_pb2.Container) -> bool:
        parts = (
            each.labels.get(criconfig.POD_NAMESPACE, ""),
            each.labels.get(criconfig.POD_NAME, ""),
            each.metadata.name,
        )
        # Who has no name (a pod without containers, too) is not meant by the names of others that end there.
        return any(all(parts[start:]) and wanted == "/".join(parts[start:]) for start in range(3))

    def in_pod(each: cri_pb2.Container) -> bool:
        return bool(wanted) and each.labels.get(criconfig.POD_NAME) == wanted

    def begins(each: cri_pb2.Container) -> bool:
        return bool(_ID_PREFIX.fullmatch(wanted)) and each.id.startswith(wanted)

    for test in (lambda each: each.id == wanted, named, in_pod, begins):
        found = [each for each in containers if test(each)]
        if len(found) > 1:
            raise errors.InvalidArgumentError(
                f"{wanted} can mean several containers: {', '.join(sorted(map(_described, found)))}",
                hint="say which: NAMESPACE/POD/NAME, or its ID",
            )
        if found:
            return found[0]
    raise errors.NotFoundError(
        f"there is no container {wanted or repr(wanted)}", hint="see what there is: nixlet ps -a"
    )


def _described(container: cri_pb2.Container) -> str:
    labels = container.labels
    place = f"{labels.get(criconfig.POD_NAMESPACE, '')}/{labels.get(criconfig.POD_NAME, '')}/{container.metadata.name}"
    return f"{place} ({container.id[:12]})"
