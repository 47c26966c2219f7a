"""A network and a place for the files of CNI plugins of a benchmark's own, which end with it."""

import os
import subprocess
import sys
from pathlib import Path

_INSIDE = "NIXLET_BENCH_ALONE"

#: Where CNI plugins and their callers keep what they know of networks; where containerd's clients and shims have pipes and sockets.
_OWN = ("/var/lib/cni", "/run/containerd")


def on_the_network() -> None:
    """Start this program again in network and mount namespaces of its own; returns there.

    nerdctl leaves a bridge, chains of the packet filter and files behind, whatever is removed.
    """
    if os.environ.get(_INSIDE) != "1":
        argv = ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, *sys.argv]
        os.execvpe(argv[0], argv, {**os.environ, _INSIDE: "1"})
    for place in _OWN:
        Path(place).mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    # Mounts that containerd's processes make are to be seen by each other.
    subprocess.run(["mount", "--make-rshared", "/"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
