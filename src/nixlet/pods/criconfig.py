"""Pods as the CRI sees them: what a kubelet would ask of the runtime for a manifest (Kubernetes, pkg/kubelet/kuberuntime)."""

import dataclasses
import os
import re
import stat
from collections.abc import Mapping

from nixlet import errors
from nixlet.containers import model
from nixlet.host import files
from nixlet.pods import hosts
from nixlet.rpc.gen import cri_pb2

POD_NAME = "io.kubernetes.pod.name"
POD_NAMESPACE = "io.kubernetes.pod.namespace"
POD_UID = "io.kubernetes.pod.uid"
CONTAINER_NAME = "io.kubernetes.container.name"

#: The label of what nixlet made, as opposed to a kubelet beside it.
MADE_BY = {"nixlet.io/made-by": "nixlet"}

#: The label of pods that the node removes when they have ended.
AUTO_REMOVE = {"nixlet.io/auto-remove": "true"}

#: Annotations: what of the host's ports is a pod's, for those who list pods, and that it has no network.
PORTS = "nixlet.io/ports"
NO_NETWORK = "nixlet.io/no-network"

#: Annotation: seconds that the pod's containers get to end by themselves.
GRACE = "nixlet.io/grace-seconds"

#: Those seconds where nobody said how many; as docker and nerdctl have it for single containers.
DEFAULT_GRACE = 10

_PROTOCOLS = {"TCP": cri_pb2.TCP, "UDP": cri_pb2.UDP, "SCTP": cri_pb2.SCTP}

#: What an unprivileged container must not see or change, as kubelets have it.
_MASKED = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

#: The slice of pods where systemd makes the cgroups: that of services, which needs nobody to take it away.
_SLICE = "system.slice"

_MIN_SHARES = 2
_MAX_SHARES = 262_144
_PERIOD = 100_000
_MIN_QUOTA = 1_000

# OOM scores by class of service (Kubernetes, pkg/kubelet/qos).
_OOM_GUARANTEED = -997
_OOM_BEST_EFFORT = 1000

#: A port as ``str(model.Port)`` writes it.
_PUBLISHED = re.compile(r"(?P<address>.+):(?P<host>\d{1,5})->(?P<container>\d{1,5})/(?P<protocol>tcp|udp|sctp)")

_REFERENCE = re.compile(r"\$(\$|\(([^)]*)\))")


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """Where a pod's files are.

    Attributes:
        uid: What tells this pod from others of its name.
        log_directory: The directory of its containers' logs.
        volumes: Volume name to directory on the host.
        hosts: Its file of names (hosts(5)).
        hostname: The file of its own name (hostname(5)); empty: the runtime makes one.
    """

    uid: str
    log_directory: str
    volumes: Mapping[str, str]
    hosts: str
    hostname: str = ""


def log_directory(root: str, pod: model.Pod, uid: str) -> str:
    """Where a pod's logs are, named as kubelets name it."""
    return os.path.join(root, f"{pod.namespace}_{pod.name}_{uid}")


def check_host_path(volume: model.Volume) -> None:
    """Make or check a hostPath volume, as its type says.

    Raises:
        FailedPreconditionError: It isn't there, or is something else.
    """
    path, kind = volume.host_path, volume.host_type
    tests = {
        "Directory": stat.S_ISDIR,
        "DirectoryOrCreate": stat.S_ISDIR,
        "File": stat.S_ISREG,
        "FileOrCreate": stat.S_ISREG,
        "Socket": stat.S_ISSOCK,
        "CharDevice": stat.S_ISCHR,
        "BlockDevice": stat.S_ISBLK,
    }
    try:
        # Without a type nothing is checked, and the runtime makes a directory where nothing is.
        if kind in {"", "DirectoryOrCreate"} and not os.path.lexists(path):
            files.new_directories(path)
        elif kind == "FileOrCreate" and not os.path.lexists(path):
            os.close(files.new_file(path))
        mode = os.stat(path).st_mode
    except OSError as error:
        raise errors.FailedPreconditionError(f"the volume {volume.name} needs {path}: {error.strerror}") from error
    if kind and not tests[kind](mode):
        raise errors.FailedPreconditionError(
            f"the volume {volume.name} needs {path} to be a {kind.removesuffix('OrCreate')}"
        )


def sandbox_config(
    pod: model.Pod,
    placement: Placement,
    dns: cri_pb2.DNSConfig | None = None,
    *,
    systemd_cgroup: bool = False,
    cgroup_parent: str = "",
) -> cri_pb2.PodSandboxConfig:
    """What to ask of the runtime for the pod itself.

    Args:
        pod: The pod.
        placement: Where it is.
        dns: Where it looks names up; None: where the host does, as a pod on the host's network does in any case.
        systemd_cgroup: The runtime has systemd make its cgroups.
        cgroup_parent: The cgroup in which it makes them itself; empty: where the runtime chooses.
    """
    privileged = any(each.security.privileged for each in (*pod.containers, *pod.init_containers))
    security = cri_pb2.LinuxSandboxSecurityContext(
        namespace_options=_namespaces(pod),
        privileged=privileged,
        supplemental_groups=pod.supplemental_groups,
        seccomp=_seccomp("RuntimeDefault"),
    )
    if pod.run_as_user is not None:
        security.run_as_user.value = pod.run_as_user
        # A group without a user is refused, and the pod's own process has no image that could say one.
        if pod.run_as_group is not None:
            security.run_as_group.value = pod.run_as_group
    linux = cri_pb2.LinuxPodSandboxConfig(security_context=security, sysctls=pod.sysctls)
    # Of systemd's, runc takes no other name, and containerd's own choice is none.
    linux.cgroup_parent = _SLICE if systemd_cgroup else cgroup_parent
    published = published_ports(pod)
    ports = [
        cri_pb2.PortMapping(
            protocol=_PROTOCOLS[port.protocol],
            container_port=port.container_port,
            host_port=port.host_port,
            host_ip=port.host_ip,
        )
        for port in published
    ]
    # What only nixlet says of a pod, a manifest can't say.
    labels = {key: value for key, value in pod.labels.items() if key not in AUTO_REMOVE}
    annotations = {key: value for key, value in pod.annotations.items() if key not in {PORTS, NO_NETWORK, GRACE}}
    annotations[GRACE] = str(pod.grace_seconds)
    if published:
        annotations[PORTS] = ", ".join(map(str, published))
    if pod.no_network:
        annotations[NO_NETWORK] = "true"
    return cri_pb2.PodSandboxConfig(
        metadata=cri_pb2.PodSandboxMetadata(name=pod.name, uid=placement.uid, namespace=pod.namespace),
        # A pod on the host's network has the host's name, for CRI; without a network each container gets its name by itself.
        hostname="" if _is_on_the_host(pod) else hostname(pod),
        log_directory=placement.log_directory,
        dns_config=None if pod.host_network else dns,
        port_mappings=ports,
        labels={**labels, **_labels(pod, placement), **MADE_BY, **(AUTO_REMOVE if pod.remove_when_ended else {})},
        annotations=annotations,
        linux=linux,
    )


def _is_on_the_host(pod: model.Pod) -> bool:
    """Whether CRI is to make a pod on the host's network: one that isn't to have any as well (``nonetwork``)."""
    return pod.host_network or pod.no_network


def _namespaces(pod: model.Pod) -> cri_pb2.NamespaceOption:
    node = cri_pb2.NODE
    return cri_pb2.NamespaceOption(
        network=node if _is_on_the_host(pod) else cri_pb2.POD,
        pid=node if pod.host_pid else cri_pb2.CONTAINER,
        ipc=node if pod.host_ipc else cri_pb2.POD,
    )


def hostname(pod: model.Pod) -> str:
    """The name of a pod's host."""
    return pod.hostname or pod.name[:63].rstrip("-.")


def published_ports(pod: model.Pod) -> list[model.Port]:
    """The ports of a pod that the host offers; one on the host's network has its own anyway."""
    if pod.host_network:
        return []
    return [port for container in pod.containers for port in container.ports if port.host_port]


def grace_of(annotations: Mapping[str, str]) -> int:
    """Seconds that a pod's containers get to end by themselves, by its annotations."""
    text = annotations.get(GRACE, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else DEFAULT_GRACE


def ports_of(annotations: Mapping[str, str]) -> list[model.Port]:
    """The ports of the host that a sandbox has, by its annotations; what nixlet can't have written is passed over."""
    found = []
    for text in annotations.get(PORTS, "").split(", "):
        if match := _PUBLISHED.fullmatch(text):
            address = match["address"].strip("[]")
            found.append(
                model.Port(
                    container_port=int(match["container"]),
                    host_port=int(match["host"]),
                    host_ip="" if address == "0.0.0.0" else address,  # noqa: S104 (nothing is bound)
                    protocol=match["protocol"].upper(),
                )
            )
    return found


def _labels(pod: model.Pod, placement: Placement) -> dict[str, str]:
    return {POD_NAME: pod.name, POD_NAMESPACE: pod.namespace, POD_UID: placement.uid}


def container_config(
    pod: model.Pod, container: model.Container, image_ref: str, placement: Placement
) -> cri_pb2.ContainerConfig:
    """What to ask of the runtime for one container.

    Args:
        pod: Its pod.
        container: The container.
        image_ref: What the pull of its image answered.
        placement: Where the pod's files are.
    """
    env = dict(container.env)
    expanded: dict[str, str] = {}
    for name, value in container.env:
        expanded[name] = expand(value, expanded)
    mounts = [
        cri_pb2.Mount(
            container_path=mount.path if mount.path.startswith("/") else f"/{mount.path}",
            host_path=placement.volumes[mount.name],
            readonly=mount.read_only,
        )
        for mount in container.mounts
    ]
    if not hosts.is_mounted_by(container, hosts.PLACE):
        mounts.append(cri_pb2.Mount(container_path=hosts.PLACE, host_path=placement.hosts))
    if placement.hostname and not hosts.is_mounted_by(container, hosts.NAME_PLACE):
        # As containerd mounts its own.
        mounts.append(
            cri_pb2.Mount(
                container_path=hosts.NAME_PLACE,
                host_path=placement.hostname,
                readonly=container.security.read_only_root,
                selinux_relabel=True,
            )
        )
    return cri_pb2.ContainerConfig(
        metadata=cri_pb2.ContainerMetadata(name=container.name),
        image=cri_pb2.ImageSpec(image=image_ref, user_specified_image=container.image),
        command=[expand(word, expanded) for word in container.command],
        args=[expand(word, expanded) for word in container.args],
        working_dir=container.working_dir,
        envs=[cri_pb2.KeyValue(key=name, value=expanded[name].encode()) for name in env],
        mounts=mounts,
        labels={**_labels(pod, placement), CONTAINER_NAME: container.name, **MADE_BY},
        annotations={"io.kubernetes.container.terminationMessagePath": "/dev/termination-log"},
        log_path=f"{container.name}/0.log",
        stdin=container.stdin,
        stdin_once=container.stdin_once,
        tty=container.tty,
        linux=cri_pb2.LinuxContainerConfig(
            resources=_resources(pod, container), security_context=_security(pod, container)
        ),
    )


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Expand ``$(NAME)``; ``$$`` is a dollar sign, and unknown names stay (Kubernetes, "Define Dependent Environment Variables")."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[1] == "$" else variables.get(match[2], match[0])

    return _REFERENCE.sub(value, text)


def _seccomp(said: str) -> cri_pb2.SecurityProfile:
    profile = cri_pb2.SecurityProfile
    if said.startswith("/"):
        return profile(profile_type=profile.Localhost, localhost_ref=said)
    return profile(profile_type=profile.RuntimeDefault if said == "RuntimeDefault" else profile.Unconfined)


def _apparmor(said: str) -> cri_pb2.SecurityProfile:
    profile = cri_pb2.SecurityProfile
    if said == "unconfined":
        return profile(profile_type=profile.Unconfined)
    return profile(profile_type=profile.Localhost, localhost_ref=said)


def _security(pod: model.Pod, container: model.Container) -> cri_pb2.LinuxContainerSecurityContext:
    own = container.security
    context = cri_pb2.LinuxContainerSecurityContext(
        capabilities=cri_pb2.Capability(add_capabilities=own.add_capabilities, drop_capabilities=own.drop_capabilities),
        privileged=own.privileged,
        namespace_options=_namespaces(pod),
        supplemental_groups=pod.supplemental_groups,
        readonly_rootfs=own.read_only_root,
        no_new_privs=own.no_new_privileges,
        seccomp=_seccomp(own.seccomp or pod.seccomp),
    )
    if own.apparmor:
        context.apparmor.CopyFrom(_apparmor(own.apparmor))
    user = pod.run_as_user if own.run_as_user is None else own.run_as_user
    group = pod.run_as_group if own.run_as_group is None else own.run_as_group
    if own.run_as_name:
        context.run_as_username = own.run_as_name
    elif user is not None:
        context.run_as_user.value = user
    if group is not None:
        context.run_as_group.value = group
    if not own.privileged:
        context.masked_paths.extend(_MASKED)
        context.readonly_paths.extend(_READ_ONLY)
    return context


def _resources(pod: model.Pod, container: model.Container) -> cri_pb2.LinuxContainerResources:
    own = container.resources
    # A limit without a request is a request as well.
    cpu = own.cpu_request or own.cpu_limit
    resources = cri_pb2.LinuxContainerResources(
        cpu_shares=min(max(cpu * 1024 // 1000, _MIN_SHARES), _MAX_SHARES),
        memory_limit_in_bytes=own.memory_limit,
        oom_score_adj=_oom_score(pod, container),
    )
    if own.cpu_limit:
        resources.cpu_period = _PERIOD
        resources.cpu_quota = max(own.cpu_limit * _PERIOD // 1000, _MIN_QUOTA)
    return resources


def _oom_score(pod: model.Pod, container: model.Container) -> int:
    everyone = [each.resources for each in (*pod.containers, *pod.init_containers)]
    if all(each == model.Resources() for each in everyone):
        return _OOM_BEST_EFFORT
    guaranteed = all(
        each.cpu_limit
        and each.memory_limit
        and each.cpu_request in {0, each.cpu_limit}
        and each.memory_request in {0, each.memory_limit}
        for each in everyone
    )
    if guaranteed:
        return _OOM_GUARANTEED
    capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    request = container.resources.memory_request or container.resources.memory_limit
    return min(max(1000 - 1000 * request // capacity, 1000 + _OOM_GUARANTEED), _OOM_BEST_EFFORT - 1)
