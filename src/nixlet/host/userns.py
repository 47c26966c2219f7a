"""User namespaces (user_namespaces(7))."""

#: What the initial user namespace maps: every identity, to itself.
_INITIAL = ["0", "0", "4294967295"]


def is_inside(uid_map: str = "/proc/self/uid_map") -> bool:
    """Whether we live in a user namespace other than the machine's first."""
    try:
        with open(uid_map, encoding="ascii") as file:
            return file.readline().split() != _INITIAL
    except FileNotFoundError:
        return False  # a kernel without user namespaces
