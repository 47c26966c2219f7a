"""Which verbs there are. A verb's module is imported when the verb is meant, and what a module needs when its verb runs."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nixlet.cli import grammar

#: The environment variable that stands for ``nixlet --debug``.
DEBUG_VARIABLE = "NIXLET_DEBUG"

#: The environment variable by which shells ask for completions.
COMPLETION_VARIABLE = "_NIXLET_COMPLETE"

#: Verb to module in this package, and what the help says of it. Each module has a verb or group of that name (dashes as underscores).
SUMMARIES = {
    "server": ("server", "Run a node: containerd, the snapshotter, the CRI image service"),
    "agent": ("agent", "Run a node without what only a server has"),
    "snapshotter": ("snapshotter", "Run the snapshotter alone, for a containerd that is there already"),
    "kube": ("kube", "Run pods from Kubernetes manifests"),
    "run": ("run", "Run a container"),
    "exec": ("exec", "Run a further process in a container"),
    "attach": ("attach", "Hand a container our terminal, input and signals"),
    "ps": ("containers", "List containers"),
    "logs": ("logs", "Print a container's output"),
    "inspect": ("inspect", "Print all that is known of containers, as JSON"),
    "stats": ("stats", "Show what containers use"),
    "stop": ("containers", "Stop containers"),
    "rm": ("containers", "Remove containers"),
    "images": ("images", "List images"),
    "image": ("image", "Build and load images"),
    "doctor": ("doctor", "Check this machine for a node"),
    "check-config": ("doctor", "The same, by its name in k3s"),
    "rootless": ("rootless", "Look at what an ordinary user's own node needs, and have it as a service"),
    "config": ("config", "Look at the configuration that a node has, and gives its containerd"),
    "certificate": ("certificate", "Look at a cluster's certificates, and make them anew"),
    "token": ("token", "Make, list and remove what nodes join a cluster by"),
    "uninstall": ("uninstall", "Take a node away"),
    "ctr": ("passthrough", "Run the real ctr against the node's containerd"),
    "crictl": ("passthrough", "Run the real crictl against the node"),
    "kubectl": ("passthrough", "Run the real kubectl against the node's cluster"),
    "completion": ("completion", "Print the completion for a shell"),
    "version": ("version", "Print versions"),
}


def find(name: str) -> "grammar.Verb | grammar.Group | None":
    """A verb or group by its name; None: there is none."""
    if name not in SUMMARIES:
        return None
    # importlib would be one more module to wait for.
    module = f"nixlet.cli.{SUMMARIES[name][0]}"
    __import__(module)
    found: grammar.Verb | grammar.Group = getattr(sys.modules[module], name.replace("-", "_"))
    return found
