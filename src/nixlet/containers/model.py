"""Pods as values: what of Kubernetes' Pod (API v1) a node without a control plane can run."""

import dataclasses
import re

from nixlet import errors

RESTART_POLICIES = ("Always", "OnFailure", "Never")

#: So many ports has a bridge (linux/net/bridge/br_private.h: BR_MAX_PORTS, of which the first stays unused).
BRIDGE_PORTS = 1023

_LABEL = r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?"

#: Names of containers and namespaces, and of pods (RFC 1123, as Kubernetes has it).
DNS_LABEL = re.compile(_LABEL)
DNS_SUBDOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")


@dataclasses.dataclass(frozen=True, slots=True)
class Port:
    """A port that a container listens on, and where the host offers it (0: nowhere)."""

    container_port: int
    host_port: int = 0
    host_ip: str = ""
    protocol: str = "TCP"

    def __str__(self) -> str:
        """As people write it: ``0.0.0.0:8080->80/tcp``."""
        address = f"[{self.host_ip}]" if ":" in self.host_ip else self.host_ip or "0.0.0.0"  # noqa: S104 (nothing is bound)
        return f"{address}:{self.host_port}->{self.container_port}/{self.protocol.lower()}"

    def collides(self, other: "Port") -> bool:
        """Whether the host can't offer both: the same number, protocol and address, or one of them at every address."""
        return (self.host_port, self.protocol) == (other.host_port, other.protocol) and (
            _covers(self.host_ip, other.host_ip) or _covers(other.host_ip, self.host_ip)
        )


def _covers(address: str, other: str) -> bool:
    """Whether a port at an address (empty: every one) is also at another."""
    everywhere = "::" if ":" in other else "0.0.0.0"  # noqa: S104 (nothing is bound)
    return address in {"", other, everywhere}


@dataclasses.dataclass(frozen=True, slots=True)
class VolumeMount:
    """Where a container sees a volume."""

    name: str
    path: str
    read_only: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Volume:
    """A directory for a pod's containers: of the host, or an empty one (``host_path`` empty) that goes with the pod."""

    name: str
    host_path: str = ""
    host_type: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class HostAlias:
    """An address that a pod knows by names of its own choice."""

    address: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Security:
    """Whose rights a container has; None is "as the pod or the image says". A name is one of the image's own users.

    ``seccomp`` is RuntimeDefault, Unconfined, or the absolute path of a profile; ``apparmor`` is "unconfined" or a profile's name, or
    empty for the runtime's default.
    """

    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_name: str = ""
    run_as_non_root: bool | None = None
    privileged: bool = False
    read_only_root: bool = False
    no_new_privileges: bool = False
    add_capabilities: tuple[str, ...] = ()
    drop_capabilities: tuple[str, ...] = ()
    seccomp: str = ""
    apparmor: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Resources:
    """CPU in thousandths of a core, memory in bytes; 0 is unlimited."""

    cpu_request: int = 0
    cpu_limit: int = 0
    memory_request: int = 0
    memory_limit: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Container:
    """A container of a pod."""

    name: str
    image: str
    pull_policy: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    ports: tuple[Port, ...] = ()
    mounts: tuple[VolumeMount, ...] = ()
    resources: Resources = Resources()
    security: Security = Security()
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Pod:
    """A pod; ``runtime`` is the name that the node's containerd has for it, empty: its default one."""

    name: str
    namespace: str = "default"
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    annotations: dict[str, str] = dataclasses.field(default_factory=dict)
    containers: tuple[Container, ...] = ()
    init_containers: tuple[Container, ...] = ()
    volumes: tuple[Volume, ...] = ()
    restart_policy: str = "Always"
    hostname: str = ""
    host_aliases: tuple[HostAlias, ...] = ()
    runtime: str = ""
    host_network: bool = False
    no_network: bool = False
    host_pid: bool = False
    host_ipc: bool = False
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_non_root: bool | None = None
    supplemental_groups: tuple[int, ...] = ()
    seccomp: str = ""
    sysctls: dict[str, str] = dataclasses.field(default_factory=dict)
    grace_seconds: int = 30
    remove_when_ended: bool = False


def checked_name(name: str, what: str) -> str:
    """A container's name that a person chose.

    Raises:
        UsageError: It doesn't fit Kubernetes' grammar for such names.
    """
    if len(name) > 63 or not DNS_LABEL.fullmatch(name):
        raise errors.UsageError(
            f"{what} {name[:80]!r} must have lower-case letters, digits and '-' only, begin and end with a letter or a"
            " digit, and have 63 characters at most"
        )
    return name


def escaped(text: str) -> str:
    """Text in which no variable is to be expanded."""
    return text.replace("$", "$$")
