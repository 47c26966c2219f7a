"""``nixlet ctr`` and ``nixlet crictl``: the real programs, told where the node is."""

import os

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import NoReturn

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
    foreign = {"CONTAINER_RUNTIME_ENDPOINT", "IMAGE_SERVICE_ENDPOINT", "CRI_CONFIG_FILE", "CONTAINERD_ADDRESS"}
    environment = {key: value for key, value in os.environ.items() if key not in foreign} | dict(own)
    os.execve(program, [name, *arguments], environment)  # noqa: S606 (no shell is wanted)
