"""``nixlet ctr``, ``nixlet crictl`` and ``nixlet kubectl``: the real programs, told where the node or the cluster is."""

import itertools
import os

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

    from nixlet.node.settings import config

# All that stands behind these verbs is the program's, also ``--help``; options of ours stand before its own.


@grammar.verb(
    options.STATE_DIR,
    grammar.Argument("arguments", several=True, required=False),
    interspersed=False,
    passes_unknown=True,
)
def ctr(arguments: tuple[str, ...], state_dir: str) -> None:
    """Run the real ctr against the node's containerd, in Kubernetes' namespace unless another is asked for."""
    from nixlet.containerd import namespaces
    from nixlet.node.settings import config

    layout = config.Layout("", os.path.abspath(state_dir))
    namespace = os.environ.get("CONTAINERD_NAMESPACE") or namespaces.CRI
    own = {"CONTAINERD_ADDRESS": layout.containerd_socket, "CONTAINERD_NAMESPACE": namespace}
    _become("ctr", arguments, own, _beside_containerd(layout.containerd_socket, "ctr"))


@grammar.verb(
    options.DATA_DIR,
    options.STATE_DIR,
    grammar.Argument("arguments", several=True, required=False),
    interspersed=False,
    passes_unknown=True,
)
def crictl(arguments: tuple[str, ...], data_dir: str, state_dir: str) -> None:
    """Run the real crictl against the node's two services."""
    from nixlet.node.settings import config

    layout = config.Layout(os.path.abspath(data_dir), os.path.abspath(state_dir))
    if os.path.exists(layout.crictl_config):
        own = {"CRI_CONFIG_FILE": layout.crictl_config}
    else:
        own = {
            "CONTAINER_RUNTIME_ENDPOINT": f"unix://{layout.containerd_socket}",
            "IMAGE_SERVICE_ENDPOINT": f"unix://{layout.node_socket}",
        }
    _become("crictl", arguments, own)


@grammar.verb(
    options.DATA_DIR,
    options.KUBERNETES_BIN_DIR,
    grammar.Argument("arguments", several=True, required=False),
    interspersed=False,
    passes_unknown=True,
)
def kubectl(arguments: tuple[str, ...], data_dir: str, kubernetes_bin_dir: str) -> None:
    """Run the real kubectl against the node's cluster, as its administrator."""
    from nixlet.host import process

    started = _last_settings(data_dir)
    directory = kubernetes_bin_dir or (started.kubernetes_bin_dir if started is not None else "")
    program = process.find_program(os.path.join(os.path.abspath(directory), "kubectl")) if directory else None
    # Who names a cluster means that one. What stands behind -- is another program's (kubectl exec, run).
    own_arguments = itertools.takewhile(lambda each: each != "--", arguments)
    named = any(each == "--kubeconfig" or each.startswith("--kubeconfig=") for each in own_arguments)
    own = {} if named else {"KUBECONFIG": _kubeconfig(data_dir, started)}
    _become("kubectl", arguments, own, program)


def _kubeconfig(data_dir: str, started: "config.Settings | None") -> str:
    """The administrator's file of the cluster that a node is the server of: root's own, or the one for people.

    Raises:
        NixletError: There is none.
    """
    from nixlet import errors
    from nixlet.cluster import layout
    from nixlet.node.cluster.preflight import mapping
    from nixlet.node.settings import configfile

    data_dir = os.path.abspath(data_dir)
    places = layout.Layout(data_dir, "")
    if os.access(places.cred("admin.kubeconfig"), os.R_OK):
        return places.cred("admin.kubeconfig")
    settings = started or configfile.load({"data_dir": data_dir}, os.environ).settings
    for_people = mapping.kubeconfig_path(settings)
    if os.access(for_people, os.R_OK):
        return for_people
    if os.path.exists(places.node("cluster.json")):
        raise errors.FailedPreconditionError(
            "this node is an agent, and the administrator's kubeconfig is on its server",
            hint="run it there, or name a copy of that file: kubectl --kubeconfig FILE",
        )
    if os.path.exists(for_people) or (os.path.isdir(data_dir) and not os.access(data_dir, os.R_OK)):
        raise errors.PermissionDeniedError(
            f"the administrator's kubeconfig {for_people} can't be read",
            hint="run it as root; --write-kubeconfig-mode of the server says who else may read it",
        )
    raise errors.FailedPreconditionError(
        f"there is no cluster in {data_dir}: no server was started there yet",
        hint="nixlet server is one where Kubernetes' programs are; --data-dir says where another one is",
    )


def _last_settings(data_dir: str) -> "config.Settings | None":
    """A node's settings when it was started the last time, as far as we may see them."""
    import msgspec

    from nixlet import errors
    from nixlet.node.ownership import marker

    try:
        known = marker.read(os.path.abspath(data_dir))
        return known.last_settings() if known is not None else None
    except (errors.NixletError, msgspec.MsgspecError):
        # Another version's, or somebody else's.
        return None


def _beside_containerd(socket: str, name: str) -> str | None:
    """A program that came with the containerd at a socket: of the same version, unlike perhaps that on PATH.

    Anybody may listen at a socket of theirs, with what they like beside their program: that only counts where nobody but root
    and we can change it.
    """
    from nixlet import errors
    from nixlet.host import process, unixsocket
    from nixlet.node.settings import trusted

    try:
        containerd = os.readlink(f"/proc/{unixsocket.peer_of(socket)}/exe")
        found = process.find_program(os.path.join(os.path.dirname(containerd), name))
        if found is not None:
            with trusted.opened(found, name):
                pass
    except (OSError, errors.NixletError):
        return None
    return found


def _become(name: str, arguments: tuple[str, ...], own: "Mapping[str, str]", program: str | None = None) -> "NoReturn":
    """Let a program take our place, by default that on PATH: terminal, signals and exit status are then its own."""
    from nixlet import errors
    from nixlet.host import process

    program = program or process.find_program(name)
    if program is None:
        raise errors.CommandNotFoundError(f"{name} is not installed", hint="install it, or put its directory on PATH")
    # Where the environment names another node, ours is meant all the same.
    foreign = {
        "KUBECONFIG",
        "CONTAINER_RUNTIME_ENDPOINT",
        "IMAGE_SERVICE_ENDPOINT",
        "CRI_CONFIG_FILE",
        "CONTAINERD_ADDRESS",
    }
    environment = {key: value for key, value in os.environ.items() if key not in foreign} | dict(own)
    os.execve(program, [name, *arguments], environment)  # noqa: S606 (no shell is wanted)
