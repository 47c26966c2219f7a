"""The RuntimeClass objects of the runtimes that a node finds by itself, as k3s has them: a pod names one, and a node that hasn't it says so.

All of them, whatever the server's own machine has: an agent's may have others.
"""

from nixlet.containerd import runtimes
from nixlet.encoding import yamlwrite

#: The name of the manifest, without its ending: what ``--disable`` calls it.
NAME = "runtimes"


def manifest() -> str:
    """All of them, as YAML."""
    return "---\n".join(
        yamlwrite.document(
            {"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": name}, "handler": name}
        )
        for name in sorted(runtimes.NAMES)
    )
