"""The users of a container: what ``exec -u`` means by its own files (passwd(5), group(5)), and who it runs as by its image."""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from nixlet import errors
from nixlet.containers import model
from nixlet.host import inroot
from nixlet.rpc.gen import cri_pb2

#: What to do about a name that an image doesn't know: those made by Nix have no passwd unless somebody puts one there.
NUMBER_HINT = "give the number of one (1000), or put an /etc/passwd with that name into the image"

#: How containerd 1.6 to 2.4 say that there is no such name.
_UNKNOWN = re.compile(
    r"etc(/passwd|/group)?: (no such file or directory|file does not exist)|no (users|groups) found|unable to find (user|group)"
)

#: As large as these files may be, in bytes.
_MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Ids:
    """Whose rights a process has, in numbers.

    Attributes:
        uid: The user.
        gid: The primary group.
        groups: All groups. The primary one is among them, or a process that changes it could shed a group that is denied something.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]


def find(root: str, wanted: model.Security) -> Ids:
    """The numbers of a user.

    A name must be one of the container's; of a number that it doesn't know, the group is 0. A group that is given takes the place
    of all that the container's files say.

    Args:
        root: The container's root directory.
        wanted: The user, by name or number, and perhaps the group.

    Raises:
        NotFoundError: The container has no user of that name.
    """
    by_name = wanted.run_as_user is None
    known = next(
        (
            each
            for each in _users(root)
            if (each[0] == wanted.run_as_name if by_name else each[1] == wanted.run_as_user)
        ),
        None,
    )
    if known is None and by_name:
        raise errors.NotFoundError(f"the container has no user {wanted.run_as_name}", hint=NUMBER_HINT)
    name, uid, gid = known or ("", wanted.run_as_user or 0, 0)
    further = _groups(root, name) if name and wanted.run_as_group is None else ()
    if wanted.run_as_group is not None:
        gid = wanted.run_as_group
    return Ids(uid, gid, tuple(dict.fromkeys((gid, *further))))


def resolved(pod: model.Pod, container: model.Container, image: cri_pb2.Image) -> model.Container:
    """A container whose user is said as far as CRI must be told, by its image where nothing else says it; as kubelets do.

    Args:
        pod: Its pod.
        container: The container.
        image: Its image, as CRI knows it.

    Raises:
        FailedPreconditionError: It must not run as root, and does, or that can't be told.
    """
    own = container.security
    user = pod.run_as_user if own.run_as_user is None else own.run_as_user
    if user is not None or own.run_as_name:
        said = dataclasses.replace(own, run_as_user=None if own.run_as_name else user)
    elif image.HasField("uid"):
        said = dataclasses.replace(own, run_as_user=image.uid.value)
    elif image.username:
        said = dataclasses.replace(own, run_as_name=image.username)
    else:
        said = dataclasses.replace(own, run_as_user=0)
    non_root = pod.run_as_non_root if own.run_as_non_root is None else own.run_as_non_root
    if non_root and (said.run_as_name or said.run_as_user == 0):
        why = "it runs as root" if user == 0 else "its image runs as root"
        if said.run_as_name:
            why = f"whether its image's user {said.run_as_name} is root can't be told"
        raise errors.FailedPreconditionError(
            f"container {container.name} must not run as root (runAsNonRoot), and {why}",
            hint="set runAsUser to the number of another user",
        )
    # Without a group, containerd makes of the image's own words what the image means, its group included.
    group = pod.run_as_group if own.run_as_group is None else own.run_as_group
    return container if group is None else dataclasses.replace(container, security=said)


def unknown(container: model.Container, error: errors.NixletError) -> errors.NotFoundError | None:
    """Why a container couldn't be made, if it is that its image doesn't know its user or group; else None.

    Args:
        container: The container.
        error: What containerd said, each version in words of its own; most tell the file alone that they missed.
    """
    if not _UNKNOWN.search(error.message):
        return None
    who = (
        f"no user {container.security.run_as_name}" if container.security.run_as_name else "not the user that it names"
    )
    return errors.NotFoundError(f"container {container.name} can't start: its image has {who}", hint=NUMBER_HINT)


def _users(root: str) -> Iterator[tuple[str, int, int]]:
    for name, _, uid, gid, *_ in _lines(root, "etc/passwd", 4):
        if _is_number(uid) and _is_number(gid):
            yield name, int(uid), int(gid)


def _groups(root: str, user: str) -> Iterator[int]:
    for _, _, gid, members, *_ in _lines(root, "etc/group", 4):
        if _is_number(gid) and user in members.split(","):
            yield int(gid)


def _lines(root: str, path: str, fields: int) -> Iterator[Sequence[str]]:
    try:
        text = inroot.read(root, path, _MAX_BYTES).decode(errors="replace")
    except OSError:
        # Many images have no such file.
        return
    # What else Python takes for a line's end may stand in a person's name.
    for line in text.split("\n"):
        found = line.split(":")
        if len(found) >= fields:
            yield found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 11 and int(text) < 2**32 - 1
