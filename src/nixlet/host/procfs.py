"""What /proc says of a process (proc_pid_status(5))."""

import os


def heeds_signal(pid: int, number: int) -> bool:
    """Whether a process handles or ignores a signal, instead of leaving it to its default effect; False when it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        masks = int(fields["SigCgt"], 16) | int(fields["SigIgn"], 16)
    except (OSError, KeyError, ValueError):
        return False
    return bool(masks >> (number - 1) & 1)


def mark_of(pid: int) -> str:
    """What tells a process from every other that has its number later, or elsewhere on this machine.

    Raises:
        OSError: It is gone.
    """
    return "/".join((boot_id(), os.readlink("/proc/self/ns/pid"), str(pid), _started(pid)))


def is_gone(mark: str) -> bool:
    """Whether a process, by its mark, has surely ended; False where that can't be seen from here."""
    boot, namespace, pid, started = (mark.split("/") + [""] * 4)[:4]
    if not pid.isdecimal() or not started:
        return False
    if boot != boot_id():
        return True
    if namespace != os.readlink("/proc/self/ns/pid"):
        return False
    try:
        return _started(int(pid)) != started
    except (FileNotFoundError, ProcessLookupError):
        return True


def boot_id() -> str:
    """What tells this boot of the kernel from others."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot (proc_pid_stat(5), field 22)."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        # The second field is the program's name in parentheses, and may hold anything.
        return file.read().rpartition(b")")[2].split()[19].decode()


def lock_holder(path: str, locks: str = "/proc/locks") -> int:
    """The process that holds a file locked for itself alone (flock(2)), as far as the kernel tells us; 0 for nobody."""
    try:
        inode = os.stat(path).st_ino
        with open(locks, encoding="ascii") as lines:
            for line in lines:
                # "1: FLOCK  ADVISORY  WRITE 42 fe:00:1234 0 EOF" (proc_locks(5)); who waits has "->" in the second place.
                fields = line.split()
                if fields[1] == "FLOCK" and fields[3] == "WRITE" and int(fields[5].rpartition(":")[2]) == inode:
                    return int(fields[4])
    except FileNotFoundError:
        pass
    return 0
