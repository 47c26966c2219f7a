"""The limits that the kernel has for our process (getrlimit(2))."""

import resource

#: As many files as a node with some thousand containers has open, each with its streams.
OPEN_FILES = 65536


def raise_open_files() -> None:
    """Let this process open ``OPEN_FILES`` files, or as many as it may: shells start programs with 1024. More stays as it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
