"""What an ordinary user's node needs of its machine: each check raises the error that a start, and doctor, show.

The kernel gives an ordinary user a user namespace, but no further user IDs in it: newuidmap and newgidmap (shadow-utils) do, as far
as /etc/subuid and /etc/subgid say (subuid(5)). rootlesskit makes the namespaces, and slirp4netns their way to the network.
"""

import os
import pwd
import stat
from collections.abc import Callable, Mapping

from nixlet import errors
from nixlet.host import process

#: Where programs that act for root are, besides PATH: a service's may lack them.
_PLACES = ("/run/wrappers/bin", "/usr/local/bin", "/usr/bin", "/bin")

#: So many user IDs does an image have, and a range that adduser(8) gives.
_IDS = 65_536

_TUN = "/dev/net/tun"

_SETTINGS = "/proc/sys"

#: With it, programs that AppArmor has no profile for may make user namespaces, and nothing in them; and where profiles are.
_APPARMOR, _PROFILES = "kernel.apparmor_restrict_unprivileged_userns", "/etc/apparmor.d"

#: Settings of the kernel, with the value by which they keep ordinary users from making user namespaces, and one by which they don't.
_SWITCHES = (
    ("kernel.unprivileged_userns_clone", 0, 1),
    ("user.max_user_namespaces", 0, 28_633),
    (_APPARMOR, 1, 0),
)

Look = Callable[[], str]


def search_path() -> str:
    """Where the programs are looked up that make the namespaces."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), *_PLACES))


def find_program(name: str, package: str, what: str) -> str:
    """The absolute path of a program that makes the namespaces.

    Raises:
        UnavailableError: It is not installed.
    """
    found = process.find_program(name, search_path())
    if found is None:
        raise errors.UnavailableError(
            f"{name} is not installed, {what}", hint=f"install it (Debian: apt install {package})"
        )
    return found


def find_rootlesskit() -> str:
    """rootlesskit; raises as ``find_program``."""
    return find_program("rootlesskit", "rootlesskit", "which makes the namespaces of an ordinary user's node")


def find_slirp4netns() -> str:
    """slirp4netns; raises as ``find_program``."""
    return find_program("slirp4netns", "slirp4netns", "which is the way to the network from an ordinary user's node")


def find_mapper(name: str) -> str:
    """newuidmap or newgidmap, where it has the right to do its work: one of the Nix store, for example, has not.

    Raises:
        UnavailableError: It is not installed.
        FailedPreconditionError: It has no such right.
    """
    found = ""
    for directory in search_path().split(os.pathsep):
        path = process.find_program(os.path.join(directory, name)) if directory else None
        if path is not None and _acts_for_root(path):
            return path
        found = found or path or ""
    if found:
        raise errors.FailedPreconditionError(
            f"{found} is not set-user-ID root, and can't give an ordinary user further user IDs",
            hint=f"install it as the system's own (Debian: apt install uidmap; NixOS has it in /run/wrappers/bin), or: sudo chmod u+s {found}",
        )
    return find_program(name, "uidmap", "without which an ordinary user has no further user IDs")


def _acts_for_root(path: str) -> bool:
    status = os.stat(path)
    if status.st_mode & stat.S_ISUID and status.st_uid == 0:
        return True
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False


def check_range(file: str, flag: str) -> str:
    """Check that we have further IDs by /etc/subuid or /etc/subgid; says how many.

    Args:
        file: Which.
        flag: usermod's flag for it, without dashes.

    Raises:
        FailedPreconditionError: We have none, or too few.
    """
    uid = os.getuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            ranges = [line.strip().split(":") for line in lines]
    except FileNotFoundError:
        ranges = []
    count = sum(
        int(each[2]) for each in ranges if len(each) == 3 and each[0] in {name, str(uid)} and each[2].isdecimal()
    )
    if count < _IDS:
        has = f"has {count} IDs" if count else "has no IDs"
        raise errors.FailedPreconditionError(
            f"{name} {has} in {file}, and containers need {_IDS}",
            hint=f"sudo usermod --add-{flag} 100000-165535 {name} (numbers that no other line of the file has)",
        )
    return f"{count} for {name} in {file}"


def check_switches() -> str:
    """Check that the kernel lets ordinary users make user namespaces, as far as it says.

    Raises:
        UnsupportedError: It doesn't.
    """
    if not os.path.exists("/proc/self/ns/user"):
        raise errors.UnsupportedError("the kernel has no user namespaces", hint="use a kernel with CONFIG_USER_NS")
    for name, refused, allowed in _SWITCHES:
        try:
            with open(os.path.join(_SETTINGS, name.replace(".", "/")), encoding="ascii") as file:
                found = int(file.read())
        except FileNotFoundError:
            continue
        if found == refused and not (name == _APPARMOR and _has_profile()):
            raise errors.UnsupportedError(
                f"{name} is {found}, which keeps ordinary users from having user namespaces",
                hint=f"sudo sysctl -w {name}={allowed} (and in a file of /etc/sysctl.d, for the next boot)",
            )
    return "ordinary users may make them"


def _has_profile() -> bool:
    """Whether AppArmor has a profile for rootlesskit, by which it may: distributions call it by its name or by its path."""
    names = ("rootlesskit", find_rootlesskit().strip("/").replace("/", "."))
    return any(os.path.exists(os.path.join(_PROFILES, name)) for name in names)


def check_tun() -> str:
    """Check that slirp4netns can make a network interface.

    Raises:
        UnavailableError: The kernel has no such interfaces at the moment.
        FailedPreconditionError: They are not for us.
    """
    if not os.path.exists(_TUN):
        raise errors.UnavailableError(f"there is no {_TUN}, which slirp4netns needs", hint="sudo modprobe tun")
    if not os.access(_TUN, os.R_OK | os.W_OK):
        raise errors.FailedPreconditionError(
            f"{_TUN} is not for ordinary users, and slirp4netns needs it", hint=f"sudo chmod 0666 {_TUN}"
        )
    return _TUN


def check_runtime_dir(state_dir: str) -> str:
    """Check that the state directory can be made.

    Raises:
        FailedPreconditionError: It is somebody else's; or there is no session of the user, which would have such directories.
    """
    above = state_dir
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    if os.access(above, os.W_OK):
        return state_dir
    if above.startswith("/run"):
        raise errors.FailedPreconditionError(
            f"{state_dir} can't be made: {above} is not ours",
            hint="log in by a session of systemd's, which makes /run/user/UID and sets XDG_RUNTIME_DIR, or have it made at boot: sudo loginctl enable-linger",
        )
    raise errors.FailedPreconditionError(
        f"{state_dir} can't be made: {above} is not ours", hint="choose another --state-dir"
    )


def looks(state_dir: str) -> Mapping[str, Look]:
    """All that is looked at, by name; each says what it saw, or raises."""
    return {
        "rootlesskit": find_rootlesskit,
        "slirp4netns": find_slirp4netns,
        "newuidmap": lambda: find_mapper("newuidmap"),
        "newgidmap": lambda: find_mapper("newgidmap"),
        "subuid": lambda: check_range("/etc/subuid", "subuids"),
        "subgid": lambda: check_range("/etc/subgid", "subgids"),
        "user namespaces": check_switches,
        "tun": check_tun,
        "runtime directory": lambda: check_runtime_dir(state_dir),
    }


def path_with_helpers() -> str:
    """PATH, with what makes namespaces: rootlesskit looks for it there.

    Raises:
        NixletError: As those that look for it.
    """
    mapper = find_mapper("newuidmap")
    helpers = (find_slirp4netns(), mapper, find_mapper("newgidmap"))
    path = os.pathsep.join(dict.fromkeys((os.environ.get("PATH", os.defpath), *map(os.path.dirname, helpers))))
    # One that can't do its work may come first.
    return path if process.find_program("newuidmap", path) == mapper else f"{os.path.dirname(mapper)}{os.pathsep}{path}"
