"""The names of capabilities (capabilities(7), linux/capability.h), as CRI wants them."""

import difflib

_NAMES = frozenset(
    [
        "AUDIT_CONTROL",
        "AUDIT_READ",
        "AUDIT_WRITE",
        "BLOCK_SUSPEND",
        "BPF",
        "CHECKPOINT_RESTORE",
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "IPC_LOCK",
        "IPC_OWNER",
        "KILL",
        "LEASE",
        "LINUX_IMMUTABLE",
        "MAC_ADMIN",
        "MAC_OVERRIDE",
        "MKNOD",
        "NET_ADMIN",
        "NET_BIND_SERVICE",
        "NET_BROADCAST",
        "NET_RAW",
        "PERFMON",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_CHROOT",
        "SYS_MODULE",
        "SYS_NICE",
        "SYS_PACCT",
        "SYS_PTRACE",
        "SYS_RAWIO",
        "SYS_RESOURCE",
        "SYS_TIME",
        "SYS_TTY_CONFIG",
        "SYSLOG",
        "WAKE_ALARM",
    ]
)

_ALL = "ALL"


def name(text: str) -> str:
    """A capability as CRI wants it: in upper case and without ``CAP_``, which containerd puts in front of whatever it gets.

    What containerd doesn't know it passes on, and runc passes over: nothing would be added or dropped.

    Raises:
        ValueError: There is none of that name; the message goes on with what may be meant.
    """
    found = text.upper().removeprefix("CAP_")
    if found in _NAMES or found == _ALL:
        return found
    near = difflib.get_close_matches(found, _NAMES, n=1)
    raise ValueError(f"{text[:80]!r}, which is no capability" + (f" (did you mean {near[0]}?)" if near else ""))
