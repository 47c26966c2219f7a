"""The users of a container, by its own files (passwd(5), group(5)): what ``exec -u`` means, as other container tools have it."""

import dataclasses
from collections.abc import Iterator, Sequence

from nixlet import errors
from nixlet.host import inroot
from nixlet.kube import model

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
    known = next(
        (each for each in _users(root) if wanted.run_as_name in each[:1] or wanted.run_as_user == each[1]), None
    )
    if known is None and wanted.run_as_user is None:
        raise errors.NotFoundError(
            f"the container has no user {wanted.run_as_name}", hint="give the number of one: -u 1000"
        )
    name, uid, gid = known or ("", wanted.run_as_user or 0, 0)
    further = _groups(root, name) if name and wanted.run_as_group is None else ()
    if wanted.run_as_group is not None:
        gid = wanted.run_as_group
    return Ids(uid, gid, tuple(dict.fromkeys((gid, *further))))


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
    for line in text.splitlines():
        found = line.split(":")
        if len(found) >= fields:
            yield found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 11 and int(text) < 2**32 - 1
