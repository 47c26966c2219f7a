"""A pod's /etc/hosts (hosts(5)), as kubelets make it: one file, which every container of the pod sees; and its /etc/hostname."""

import os
import posixpath
from collections.abc import Iterable, Sequence

from nixlet.containers import model
from nixlet.host import files

#: Where containers have it, and the host.
PLACE = "/etc/hosts"

#: Where containers have their own name (hostname(5)).
NAME_PLACE = "/etc/hostname"

#: As large as the host's may be, in bytes.
_MAX_BYTES = 1 << 20

#: What every pod has, on the host's network or not.
_LOCAL = (
    ("127.0.0.1", ("localhost",)),
    ("::1", ("localhost", "ip6-localhost", "ip6-loopback")),
    ("fe00::0", ("ip6-localnet",)),
    ("fe00::0", ("ip6-mcastprefix",)),
    ("fe00::1", ("ip6-allnodes",)),
    ("fe00::2", ("ip6-allrouters",)),
)


def render(addresses: Iterable[str], name: str, aliases: Sequence[model.HostAlias]) -> str:
    """The file of a pod with a network of its own.

    Args:
        addresses: Its addresses; without any it has its local lines alone.
        name: Its host's name.
        aliases: What it wants to know besides.
    """
    lines = [*_LOCAL, *((address, (name,)) for address in addresses), *((each.address, each.names) for each in aliases)]
    return "".join(f"{address}\t{' '.join(names)}\n" for address, names in lines)


def of_the_host(aliases: Sequence[model.HostAlias]) -> str:
    """The file of a pod on the host's network: the host's own, and what the pod wants to know besides."""
    try:
        with open(PLACE, "rb") as file:
            text = file.read(_MAX_BYTES).decode(errors="surrogateescape")
    except FileNotFoundError:
        return render((), "", aliases)
    if text and not text.endswith("\n"):
        text += "\n"
    return text + "".join(f"{each.address}\t{' '.join(each.names)}\n" for each in aliases)


def write(path: str, text: str) -> None:
    """Write a pod's file. It goes with the pod, so that nobody waits for the disk.

    Raises:
        NixletError: The file system refuses.
    """
    with files.refusing(f"{path} can't be written"), os.fdopen(files.new_file(path), "wb") as file:
        file.write(text.encode(errors="surrogateescape"))


def fill(path: str, text: str) -> None:
    """Write a file that ``write`` has made and no container reads yet.

    Raises:
        NixletError: The file system refuses.
    """
    opening = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with files.refusing(f"{path} can't be written"), os.fdopen(os.open(path, opening), "wb") as file:
        file.write(text.encode())


def is_mounted_by(container: model.Container, place: str) -> bool:
    """Whether a container has something of its own at a place."""
    return any(posixpath.normpath(posixpath.join("/", mount.path)) == place for mount in container.mounts)
