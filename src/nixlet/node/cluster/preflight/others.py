"""Whether other nodes of Kubernetes are at work on this machine: what they rely on has the same names as what ours had, and stays."""

import contextlib
import os

#: Programs by what does their work.
KUBELET, PROXY, FLANNEL = b"kubelet", b"kube-proxy", b"flanneld"

#: Programs that have all of them in themselves, by the words that their command lines begin with: k3s's (whose other words make it a client), MicroK8s's.
_WHOLE = ((b"k3s", b"server"), (b"k3s", b"agent"), (b"kubelite",))


def run(program: bytes, *, here: bool = False) -> bool:
    """Whether somebody's program runs, or one that does its work.

    Args:
        program: One of the above.
        here: In our network namespace: the packet filter, routes and interfaces are a namespace's.
    """
    own = _network("self")
    for entry in filter(str.isdigit, os.listdir("/proc")):
        # One that has ended, and that nobody has asked for, has no command line any more.
        with contextlib.suppress(OSError):
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                words = file.read()
            if _does(program, words) and not (here and _network(entry) != own):
                return True
    return False


def _does(program: bytes, cmdline: bytes) -> bool:
    """Whether it is a command line of such a program."""
    if os.path.basename(cmdline.partition(b"\0")[0]) == program:
        return True
    # (k3s writes its own anew, without its secrets, with spaces between the words)
    words = cmdline.replace(b"\0", b" ").split(maxsplit=2)[:2]
    if not words:
        return False
    words[0] = os.path.basename(words[0])
    return any(tuple(words[: len(each)]) == each for each in _WHOLE)


def _network(process: str) -> int:
    return os.stat(f"/proc/{process}/ns/net").st_ino
