"""The namespaces of an ordinary user's node: rootlesskit makes them, and starts the node in them once more.

    nixlet server --rootless, which becomes
    rootlesskit: makes the user namespace (newuidmap), starts slirp4netns, hands signals on
        rootlesskit, process 1 of namespaces of processes, mounts, network, names and IPC
            nixlet server --rootless, which is root there

All that the node starts ends with process 1, whoever was killed: pods don't outlive an ordinary user's node.

What programs have at places of their own in /run, /var/lib and /etc is the machine's root's. So the node has copies of these directories,
whose entries are links to what was there (rootlesskit: ``--copy-up``), and replaces those that it needs itself.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from nixlet import errors
from nixlet.host import cgroups, files, mounts, process, userns
from nixlet.node.requirements import rootless
from nixlet.node.settings import config as node_config
from nixlet.node.settings import names, trusted

#: Directories of which the node has copies.
_COPIED = ("/etc", "/run", "/var/lib")

#: What it, containerd, its shims, runc and the CNI plugins make there themselves.
_OWN = (
    "/run/containerd",
    "/run/netns",
    "/run/runc",
    "/run/xtables.lock",
    "/run/nixlet-networks",
    "/var/lib/cni",
)

#: The cgroup that rootlesskit moves itself and the node to, so that those of pods can be beside it (cgroups(7), "no internal processes").
_EVACUATION = "nixlet"


def become_inside(settings: node_config.Settings, config_files: Sequence[str]) -> None:
    """Go on as root of a namespace: become rootlesskit, which starts nixlet with the same arguments in namespaces; there, make them its own.

    Args:
        settings: The node's, as ``rules.checked`` returns them.
        config_files: Those that they were read from.

    Raises:
        NixletError: The machine lacks something for it; or there is a node with these directories already.
    """
    if names.INSIDE not in os.environ:
        _enter(settings, config_files)
    _settle(settings)


def _enter(settings: node_config.Settings, config_files: Sequence[str]) -> NoReturn:
    if os.geteuid() == 0:
        raise errors.UsageError(
            "--rootless is for ordinary users: root's node needs no user namespace",
            hint="leave it out, or run nixlet as the user whose node it is to be",
        )
    for look in rootless.looks(settings.state_dir).values():
        look()
    layout = node_config.Layout(settings.data_dir, settings.state_dir)
    for directory in (layout.data_dir, layout.state_dir):
        # They are bound from the outside, so they have to be there.
        files.make_directory(directory, mode=0o711)
    if files.holder(layout.state_lock):
        raise errors.FailedPreconditionError(
            f"a node runs already in {layout.state_dir}",
            hint="stop it, or choose other directories: --state-dir, --data-dir",
        )
    obeyed = (*config_files, settings.private_registry, os.path.dirname(layout.containerd_config), layout.data_dir)
    own = {"PATH": rootless.path_with_helpers(), names.INSIDE: trusted.of_root(obeyed)}
    environment = {**os.environ, **names.of_session(os.environ), **own}
    # systemd's watchdog waits for signs of whoever says that it is well, and not of this process (sd_watchdog_enabled(3)).
    environment.pop("WATCHDOG_PID", None)
    program = rootless.find_rootlesskit()
    argv = [program, *_options(layout), *process.python("nixlet"), *sys.argv[1:]]
    os.execve(program, argv, environment)  # noqa: S606 (no shell is wanted)


def _options(layout: node_config.Layout) -> list[str]:
    delegated = ["--cgroupns", f"--evacuate-cgroup2={_EVACUATION}"] if cgroups.is_delegated() else []
    return [
        f"--state-dir={layout.rootlesskit_state}",
        *("--net=slirp4netns", "--disable-host-loopback", "--port-driver=builtin"),
        *("--pidns", "--ipcns", "--utsns"),
        # Disks that come later are seen, where the machine lets them be.
        f"--propagation={'rslave' if mounts.are_shared() else 'rprivate'}",
        *(f"--copy-up={directory}" for directory in _COPIED),
        *delegated,
    ]


def _settle(settings: node_config.Settings) -> None:
    if not userns.is_inside():
        raise errors.FailedPreconditionError(
            f"{names.INSIDE} is set, and this is not the inside of an ordinary user's node",
            hint=f"unset {names.INSIDE}",
        )
    # Who runc takes for somebody else keeps a directory of its own in XDG_RUNTIME_DIR.
    os.environ.update({"USER": "root", "LOGNAME": "root"})
    for path in _OWN:
        # Only links are the copy's; what is one of the machine's stays behind it.
        if os.path.islink(path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
    for directory in (settings.data_dir, settings.state_dir):
        _have_in_place(directory)


def _have_in_place(directory: str) -> None:
    """Have a directory in a copied one by the path that it has outside, with no link on the way: runc refuses such a root."""
    step = ""
    for part in directory.split("/")[1:]:
        step = f"{step}/{part}"
        if os.path.dirname(step) in _COPIED and os.path.islink(step):
            real = os.path.realpath(step)
            os.unlink(step)
            break
    else:
        return
    # The topmost directory that is ours, with all else that is in it, such as the sockets of a user's session.
    for part in ("", *directory.removeprefix(step).split("/")[1:]):
        real, step = (os.path.join(real, part), os.path.join(step, part)) if part else (real, step)
        if os.stat(real).st_uid == os.geteuid() or step == directory:
            files.make_directory(step)
            mounts.mount(real, step, "", mounts.MS_BIND | mounts.MS_REC)
            return
