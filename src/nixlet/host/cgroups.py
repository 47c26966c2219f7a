"""What a process may do with cgroups (cgroups(7))."""

import os


def controllers(proc: str = "/proc/self", root: str = "/sys/fs/cgroup") -> frozenset[str]:
    """The controllers of our own cgroup: those of version 1's hierarchies, and those that version 2's hands down to us."""
    found: set[str] = set()
    with open(os.path.join(proc, "cgroup"), encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            number, names, path = line.rstrip("\n").split(":", 2)
            if number != "0" or names:
                found.update(names.split(","))
                continue
            try:
                with open(f"{root}{path}/cgroup.controllers", encoding="ascii") as delegated:
                    found.update(delegated.read().split())
            except OSError:
                # Version 2 is mounted elsewhere, beside version 1, or not at all.
                continue
    return frozenset(found)


def systemd_runs(root: str = "/run/systemd") -> bool:
    """Whether this machine is systemd's (sd_booted(3)), and its manager can be asked for cgroups: root's socket, which runc uses where there is no bus."""
    return os.path.isdir(os.path.join(root, "system")) and os.path.exists(os.path.join(root, "private"))


def systemd_makes_ours() -> bool:
    """Whether we are a service of systemd's (systemd.exec(5): ``$INVOCATION_ID``) that is handed what pods need; k3s's rule."""
    return bool(os.environ.get("INVOCATION_ID")) and "cpuset" in controllers()


def are_ours(root: str = "/sys/fs/cgroup") -> bool:
    """Whether we can limit what containers use, as in a user namespace that cgroups were delegated to."""
    return {"cpu", "pids"} <= controllers(root=root) and (os.access(root, os.W_OK) or bool(delegated(root=root)))


def delegated(proc: str = "/proc/self", root: str = "/sys/fs/cgroup") -> str:
    """The cgroup that root has given us in all of version 1's hierarchies, under one name; empty: none.

    Version 2 needs no name: with a cgroup namespace what is delegated is the topmost one (cgroup_namespaces(7)).
    """
    found = set()
    with open(os.path.join(proc, "cgroup"), encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            number, names, path = line.rstrip("\n").split(":", 2)
            place = f"{root}/{names.removeprefix('name=')}"
            if number != "0" and os.path.isdir(place):
                found.add(path if os.access(place + path, os.W_OK) else "/")
    return found.pop() if len(found) == 1 and found != {"/"} else ""


def is_delegated(proc: str = "/proc/self", root: str = "/sys/fs/cgroup") -> bool:
    """Whether our own cgroup of version 2 is ours to divide, as that of a user's service with ``Delegate=`` is."""
    if not os.path.exists(os.path.join(root, "cgroup.controllers")):
        return False
    with open(os.path.join(proc, "cgroup"), encoding="utf-8", errors="surrogateescape") as file:
        path = file.read().rstrip("\n").rpartition("::")[2]
    return all(os.access(each, os.W_OK) for each in (f"{root}{path}", f"{root}{path}/cgroup.procs"))
