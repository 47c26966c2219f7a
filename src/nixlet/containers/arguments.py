"""What people write behind ``-p``, ``-v``, ``-e``, ``-u`` and the like, as the container tools they know read it."""

import ipaddress
import json
import os
import re
from collections.abc import Iterable, Sequence

from nixlet import errors
from nixlet.containers import capabilities, model

_UID_MAX = 2**32 - 2
_PROTOCOLS = ("TCP", "UDP", "SCTP")

#: ``[ADDRESS:]HOST:CONTAINER[/PROTOCOL]``, an IPv6 address in brackets; a port may be a range of them.
_PORT = re.compile(
    r"(?:(?:\[(?P<six>[^\]]*)\]|(?P<four>[^:\[\]]*)):)?"
    r"(?P<host>\d+)(?:-(?P<host_last>\d+))?:(?P<container>\d+)(?:-(?P<container_last>\d+))?(?:/(?P<protocol>\w+))?"
)

#: ``--security-opt``: a word, and a value behind "=" or, as docker had it once, ":".
_OPTION = re.compile(r"([a-z-]+)(?:([=:])(.*))?")
_SECCOMP = {"unconfined": "Unconfined", "builtin": "RuntimeDefault"}

#: The kernel keeps no more (sethostname(2)).
_HOSTNAME_MAX = 64

#: A profile may be this large (bytes).
_MAX_PROFILE = 1 << 20


def port_range(text: str) -> list[model.Port]:
    """The ports that the host is to offer: ``[ADDRESS:]HOST:CONTAINER[/udp]``, or as many on both sides: ``8000-8010:80-90``.

    Raises:
        UsageError: It is none.
    """
    shown = f"--publish {text[:80]!r}"
    match = _PORT.fullmatch(text)
    if match is None:
        raise errors.UsageError(
            f"{shown} is not [ADDRESS:]HOST:CONTAINER[/udp]", hint="say which port of the host it is: -p 8080:80"
        )
    protocol = (match["protocol"] or "tcp").upper()
    if protocol not in _PROTOCOLS:
        raise errors.UsageError(f"{shown}: {protocol.lower()} is none of tcp, udp, sctp")
    sides = []
    for side in ("host", "container"):
        first, last = (
            int(each) if len(each) <= 5 else 0 for each in (match[side], match[f"{side}_last"] or match[side])
        )
        if not 1 <= first <= last <= 65535:
            raise errors.UsageError(
                f"{shown}: a port is a number from 1 to 65535, and a range begins with the lower one"
            )
        sides.append(range(first, last + 1))
    if len(sides[0]) != len(sides[1]):
        raise errors.UsageError(f"{shown}: the host's range has {len(sides[0])} ports, the container's {len(sides[1])}")
    address = match["six"] if match["six"] is not None else match["four"] or ""
    if address:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError as error:
            raise errors.UsageError(f"{shown}: {address!r} is no IP address") from error
        if (parsed.version == 6) != (match["six"] is not None) or getattr(parsed, "scope_id", None):
            raise errors.UsageError(f"{shown}: an IPv6 address stands in brackets and has no zone")
    return [model.Port(inner, outer, address, protocol) for outer, inner in zip(*sides, strict=True)]


def ports(texts: Iterable[str]) -> tuple[model.Port, ...]:
    """The ports that the host is to offer.

    Raises:
        UsageError: One is none, or two of them can't be offered together.
    """
    found: list[model.Port] = []
    for text, new in ((each, port) for each in texts for port in port_range(each)):
        if any(new.collides(other) for other in found):
            raise errors.UsageError(f"--publish {text!r} asks for port {new.host_port} of the host a second time")
        found.append(new)
    return tuple(found)


def volumes(
    texts: Sequence[str], directory: str | None
) -> tuple[tuple[model.Volume, ...], tuple[model.VolumeMount, ...]]:
    """Directories and files of the host, ``HOST:CONTAINER[:ro]``; a directory of the host that isn't there is made.

    Args:
        texts: What was written.
        directory: Where relative paths of the host begin; None: that isn't known.

    Raises:
        UsageError: One is malformed, or two are at the same place.
    """
    made: list[model.Volume] = []
    mounts: list[model.VolumeMount] = []
    for number, text in enumerate(texts):
        host, _, rest = text.partition(":")
        place, colon, mode = rest.partition(":")
        if not host or not place or "\0" in text:
            raise errors.UsageError(f"--volume {text[:80]!r} is not HOST:CONTAINER or HOST:CONTAINER:ro")
        if colon and mode not in {"ro", "rw"}:
            raise errors.UsageError(f"--volume {text[:80]!r}: {mode[:20]!r} is neither ro nor rw")
        if not host.startswith(("/", "./", "../")) and host not in {".", ".."}:
            raise errors.UsageError(
                f"--volume {text[:80]!r}: {host[:60]!r} is no path, and there are no named volumes",
                hint=f"for a directory here, write ./{host[:60]}",
            )
        place = os.path.normpath(place)
        if not place.startswith("/") or place.strip("/") == "":
            raise errors.UsageError(
                f"--volume {text[:80]!r}: the place in the container must be an absolute path, not /"
            )
        if place in {mount.path for mount in mounts}:
            raise errors.UsageError(f"--volume {text[:80]!r}: something else is to be at {place} already")
        path = os.path.normpath(_joined(directory, host))
        name = f"volume-{number}"
        made.append(model.Volume(name, path, "" if os.path.exists(path) else "DirectoryOrCreate"))
        mounts.append(model.VolumeMount(name, place, mode == "ro"))
    return tuple(made), tuple(mounts)


def user(text: str) -> model.Security:
    """Whose rights a process has: ``USER``, ``UID`` or either with ``:GID``.

    Raises:
        UsageError: It is none of these.
    """
    name, colon, group = text.partition(":")
    if not name or (colon and not group):
        raise errors.UsageError(f"--user {text[:80]!r} is not USER, UID, USER:GID or UID:GID")
    gid = _number(group, text) if group else None
    if gid is None and group:
        raise errors.UsageError(f"--user {text[:80]!r}: a group is given by its number")
    # Root is root also where nothing says so: images made by Nix have no passwd unless somebody puts one there.
    uid = 0 if name == "root" else _number(name, text)
    return model.Security(run_as_user=uid, run_as_group=gid, run_as_name="" if uid is not None else name)


def hostname(text: str) -> str:
    """The name of a container's host, one word or with its domain (hostname(7)).

    Raises:
        UsageError: It is none.
    """
    if len(text) > _HOSTNAME_MAX or not model.DNS_SUBDOMAIN.fullmatch(text.lower()):
        raise errors.UsageError(
            f"--hostname {text[:80]!r} must have letters, digits, '-' and '.' only, and {_HOSTNAME_MAX} of them at most"
        )
    return text


def host_aliases(options: Iterable[str]) -> tuple[model.HostAlias, ...]:
    """Names that a container knows besides: ``NAME:ADDRESS``, an IPv6 address in brackets or not.

    Raises:
        UsageError: One is malformed.
    """
    found = []
    for text in options:
        name, sign, address = text.partition("=" if "=" in text else ":")
        address = address.removeprefix("[").removesuffix("]")
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            raise errors.UsageError(f"--add-host {text[:80]!r} is not NAME:ADDRESS") from error
        if not sign or not model.DNS_SUBDOMAIN.fullmatch(name.lower()):
            raise errors.UsageError(f"--add-host {text[:80]!r}: {name[:80]!r} is no name of a host")
        found.append(model.HostAlias(address, (name,)))
    return tuple(found)


def security(
    options: Iterable[str],
    directory: str | None,
    *,
    add: Iterable[str] = (),
    drop: Iterable[str] = (),
    privileged: bool = False,
) -> model.Security:
    """What a container may do: what stands behind ``--security-opt``, ``--cap-add`` and ``--cap-drop``.

    Without a word system calls are filtered by the runtime's default profile, as other container tools have it.

    Args:
        options: ``--security-opt``.
        directory: Where a profile's relative path begins; None: that isn't known.
        add: ``--cap-add``.
        drop: ``--cap-drop``.
        privileged: It may do all that root may.

    Raises:
        UsageError: Something of it is not known, or a profile can't be read.
    """
    seccomp, apparmor, no_new_privileges = "RuntimeDefault", "", False
    for text in options:
        match = _OPTION.fullmatch(text)
        key, sign, value = match.groups("") if match else (text, "", "")
        if key == "seccomp" and value:
            seccomp = _SECCOMP.get(value) or _profile(value, directory)
        elif key == "apparmor" and value:
            apparmor = value
        elif key == "no-new-privileges" and value in {"", "true", "false"} and bool(sign) == bool(value):
            no_new_privileges = value != "false"
        else:
            raise errors.UsageError(
                f"--security-opt {text[:80]!r} is not supported",
                hint="there are seccomp=unconfined, seccomp=FILE, apparmor=PROFILE and no-new-privileges",
            )
    return model.Security(
        privileged=privileged,
        no_new_privileges=no_new_privileges,
        add_capabilities=_capabilities("--cap-add", add),
        drop_capabilities=_capabilities("--cap-drop", drop),
        seccomp=seccomp,
        apparmor=apparmor,
    )


def _joined(directory: str | None, path: str) -> str:
    if directory is None and not path.startswith("/"):
        raise errors.UsageError(
            f"where the path {path[:80]!r} begins is not known: the working directory is gone, or is not UTF-8",
            hint="go to another one (cd), or write the path from / on",
        )
    return os.path.join(directory or "/", path)


def _profile(path: str, directory: str | None) -> str:
    """A seccomp profile, as an absolute path: containerd reads it when it makes the container."""
    place = os.path.normpath(_joined(directory, path))
    try:
        with open(place, "rb") as file:
            parsed = json.loads(file.read(_MAX_PROFILE))
    except OSError as error:
        raise errors.UsageError(f"the seccomp profile {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise errors.UsageError(f"the seccomp profile {path} is no JSON: {error}") from error
    if not isinstance(parsed, dict) or "defaultAction" not in parsed:
        raise errors.UsageError(f"{path} is no seccomp profile: it has no defaultAction")
    return place


def _capabilities(option: str, texts: Iterable[str]) -> tuple[str, ...]:
    try:
        return tuple(capabilities.name(each) for text in texts for each in text.split(","))
    except ValueError as error:
        raise errors.UsageError(f"{option} has {error}") from error


def _number(digits: str, text: str) -> int | None:
    if not (digits.isascii() and digits.isdigit()):
        return None
    number = int(digits) if len(digits) < 12 else _UID_MAX + 1
    if number > _UID_MAX:
        raise errors.UsageError(f"--user {text[:80]!r}: numbers of users and groups end at {_UID_MAX}")
    return number


def variables(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """The variables of a process, ``NAME=VALUE`` each.

    Raises:
        UsageError: One has no name, or no value.
    """
    found = []
    for text in texts:
        name, sign, value = text.partition("=")
        if not name or not sign or "\0" in text or any(letter.isspace() for letter in name):
            raise errors.UsageError(f"--env {text[:80]!r} is not NAME=VALUE")
        found.append((name, value))
    return tuple(found)


def image(text: str, directory: str | None) -> str:
    """An image's reference: a path stands for the archive there, also through links such as nix-build's ``result``.

    Args:
        text: What was written.
        directory: Where the person is; None: that isn't known.

    Raises:
        UsageError: It is a path that begins there, and that isn't known.
    """
    if text.startswith(("/", "./", "../")) or text == "result":
        return f"nix:0{os.path.realpath(_joined(directory, text))}"
    return text
