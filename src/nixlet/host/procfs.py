"""What /proc says of a process (proc_pid_status(5))."""


def heeds_signal(pid: int, number: int) -> bool:
    """Whether a process handles or ignores a signal, instead of leaving it to its default effect; False when it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        masks = int(fields["SigCgt"], 16) | int(fields["SigIgn"], 16)
    except (OSError, KeyError, ValueError):
        return False
    return bool(masks >> (number - 1) & 1)
