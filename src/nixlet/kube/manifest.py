"""Pod manifests: Kubernetes' YAML (API v1, kind Pod) as values, as far as a node without a control plane can run them.

What can't be honoured is refused by name and line, never passed over. Fields that only a scheduler or an API server heeds are
accepted with a notice.
"""

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence

from nixlet import errors
from nixlet.containers import capabilities, model
from nixlet.encoding import yamlread
from nixlet.kube import quantity

_UID_MAX = 2**32 - 2
#: Printable, and no sign of equality: what API servers take from 1.32 on (feature gate RelaxedEnvironmentVariableValidation).
_ENV_NAME = re.compile(r"[ -<>-~]+")

#: A file's name has 255 bytes; in that of a pod's directory is its UID as well, and two underscores.
_NAMES_MAX = 255 - 36 - 2

#: Heeded by a scheduler or an API server, of which there is none.
_CLUSTER_FIELDS = (
    "nodeSelector",
    "nodeName",
    "tolerations",
    "affinity",
    "topologySpreadConstraints",
    "priority",
    "priorityClassName",
    "preemptionPolicy",
    "schedulerName",
    "serviceAccountName",
    "serviceAccount",
    "automountServiceAccountToken",
    "enableServiceLinks",
)


def parse(text: bytes, source: str) -> tuple[list[model.Pod], list[str]]:
    """Read the pods of a manifest, and what there is to say about fields that have no effect.

    Raises:
        UsageError: It is no manifest of pods, or asks for something that is not supported; file and line are named.
    """
    pods: list[model.Pod] = []
    notices: list[str] = []
    for document in yamlread.documents(text, source):
        kind, version = document.required_text("kind"), document.required_text("apiVersion")
        if (version, kind) != ("v1", "Pod"):
            raise document.error(
                "", f"is of kind {yamlread.shown(kind)} ({yamlread.shown(version)}); only Pod (v1) is supported"
            )
        notices += document.skip("status")
        pods.append(_pod(document, notices))
        document.end()
    if not pods:
        raise errors.UsageError(f"{source} holds no pod")
    return pods, [f"{notice} has no effect without a cluster" for notice in notices]


def _pod(document: yamlread.Mapping, notices: list[str]) -> model.Pod:
    metadata, spec = document.mapping("metadata"), document.mapping("spec")
    if metadata is None:
        raise document.missing("metadata")
    if spec is None:
        raise document.missing("spec")
    name = _name(metadata, "name", model.DNS_SUBDOMAIN, 253)
    namespace = _optional_name(metadata, "namespace") or "default"
    if len(f"{namespace}{name}") > _NAMES_MAX:
        raise metadata.error(
            "name",
            f"is too long: a pod's files are named after it and its namespace, which have {_NAMES_MAX} characters",
        )
    labels, annotations = metadata.text_map("labels"), metadata.text_map("annotations")
    metadata.skip("creationTimestamp", "uid", "resourceVersion", "generation", "managedFields", "ownerReferences")
    metadata.end()
    notices += spec.skip(*_CLUSTER_FIELDS)
    if spec.boolean("hostUsers") is False:
        raise spec.error("hostUsers", "must be true: pods in user namespaces are not supported yet")
    security = spec.mapping("securityContext")
    if security is None:
        own = model.Security()
        groups: tuple[int, ...] = ()
        sysctls: dict[str, str] = {}
    else:
        groups = tuple(security.integers("supplementalGroups", 0, _UID_MAX))
        sysctls = dict(_sysctl(each) for each in security.mappings("sysctls"))
        own = _security(security)
    volumes = tuple(_volume(each) for each in spec.mappings("volumes"))
    names = {volume.name for volume in volumes}
    _refuse_twins(spec, "volumes", [volume.name for volume in volumes])
    if spec.kind("containers") == "nothing" and (error := spec.missing("containers")).hint:
        raise error
    containers = tuple(_container(each, names, notices) for each in spec.mappings("containers"))
    init_containers = tuple(_container(each, names, notices) for each in spec.mappings("initContainers"))
    if not containers:
        raise spec.error("containers", "is missing or empty")
    _refuse_twins(spec, "containers", [container.name for container in (*containers, *init_containers)])
    host_network = bool(spec.boolean("hostNetwork"))
    if not host_network:
        _refuse_collisions(spec, [port for container in containers for port in container.ports if port.host_port])
    pod = model.Pod(
        name=name,
        namespace=namespace,
        labels=labels,
        annotations=annotations,
        containers=containers,
        init_containers=init_containers,
        volumes=volumes,
        restart_policy=spec.choice("restartPolicy", model.RESTART_POLICIES, "Always"),
        hostname=_optional_name(spec, "hostname"),
        host_aliases=tuple(_alias(each) for each in spec.mappings("hostAliases")),
        runtime=_optional_name(spec, "runtimeClassName"),
        host_network=host_network,
        host_pid=bool(spec.boolean("hostPID")),
        host_ipc=bool(spec.boolean("hostIPC")),
        run_as_user=own.run_as_user,
        run_as_group=own.run_as_group,
        run_as_non_root=own.run_as_non_root,
        supplemental_groups=groups,
        seccomp=own.seccomp,
        sysctls=sysctls,
        grace_seconds=_or(spec.integer("terminationGracePeriodSeconds", 0, 2**31 - 1), 30),
    )
    # The node's resolv.conf is what every pod gets, which is what these two mean without a cluster's name service.
    spec.choice("dnsPolicy", ("Default", "ClusterFirst", "ClusterFirstWithHostNet"), "ClusterFirst")
    spec.end()
    return pod


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _refuse_twins(spec: yamlread.Mapping, key: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise spec.error(key, f"has two {key} named {name}")
        seen.add(name)


def _refuse_collisions(spec: yamlread.Mapping, published: Sequence[model.Port]) -> None:
    for number, port in enumerate(published):
        if any(port.collides(other) for other in published[:number]):
            raise spec.error(
                "containers", f"asks for port {port.host_port} of the host ({port.protocol}) a second time"
            )


def _name(where: yamlread.Mapping, key: str, grammar: re.Pattern[str], limit: int) -> str:
    return _checked_name(where, key, where.required_text(key), grammar, limit)


def _optional_name(where: yamlread.Mapping, key: str) -> str:
    name = where.text(key)
    return _checked_name(where, key, name, model.DNS_LABEL, 63) if name else ""


def _checked_name(where: yamlread.Mapping, key: str, value: str, grammar: re.Pattern[str], limit: int) -> str:
    if len(value) > limit or not grammar.fullmatch(value):
        signs = "digits, '-' and '.'" if grammar is model.DNS_SUBDOMAIN else "digits and '-'"
        raise where.error(
            key,
            f"is {value[:80]!r}: it must have lower-case letters, {signs} only, begin and end with a letter or a digit,"
            f" and have {limit} characters at most",
        )
    return value


def _sysctl(item: yamlread.Mapping) -> tuple[str, str]:
    name, value = item.required_text("name"), item.required_text("value")
    item.end()
    return name, value


def _alias(item: yamlread.Mapping) -> model.HostAlias:
    address, names = item.required_text("ip"), item.texts("hostnames") or []
    if not _is_address(address):
        raise item.error("ip", f"is {address[:80]!r}, which is no IP address")
    for name in names:
        if len(name) > 253 or not model.DNS_SUBDOMAIN.fullmatch(name):
            raise item.error("hostnames", f"has {name[:80]!r}, which is no name of a host")
    if not names:
        raise item.error("hostnames", "is missing or empty")
    item.end()
    return model.HostAlias(address, tuple(names))


def _container(item: yamlread.Mapping, volumes: set[str], notices: list[str]) -> model.Container:
    name = _name(item, "name", model.DNS_LABEL, 63)
    image = item.required_text("image")
    tag = image.rpartition("/")[2].partition(":")[2]
    default_policy = "Always" if "@" not in image and tag in {"", "latest"} else "IfNotPresent"
    container = model.Container(
        name=name,
        image=image,
        pull_policy=item.choice("imagePullPolicy", ("Always", "IfNotPresent", "Never"), default_policy),
        command=tuple(item.texts("command") or ()),
        args=tuple(item.texts("args") or ()),
        env=tuple(_variable(each) for each in item.mappings("env")),
        working_dir=item.text("workingDir"),
        ports=tuple(_port(each) for each in item.mappings("ports")),
        mounts=_mounts(item, volumes),
        resources=_resources(item.mapping("resources")),
        security=_container_security(item.mapping("securityContext")),
        stdin=bool(item.boolean("stdin")),
        stdin_once=bool(item.boolean("stdinOnce")),
        tty=bool(item.boolean("tty")),
    )
    notices += item.skip("terminationMessagePath", "terminationMessagePolicy")
    item.end()
    return container


def _variable(item: yamlread.Mapping) -> tuple[str, str]:
    name = item.required_text("name")
    if not _ENV_NAME.fullmatch(name):
        raise item.error("name", f"{name[:80]!r} is no name for an environment variable")
    value = item.text("value")
    item.end()
    return name, value


def _port(item: yamlread.Mapping) -> model.Port:
    number = item.integer("containerPort", 1, 65535)
    if number is None:
        raise item.missing("containerPort")
    item.skip("name")
    host_ip = item.text("hostIP")
    if host_ip and not _is_address(host_ip):
        raise item.error("hostIP", f"is {host_ip[:80]!r}, which is no IP address")
    port = model.Port(
        container_port=number,
        host_port=_or(item.integer("hostPort", 1, 65535), 0),
        host_ip=host_ip,
        protocol=item.choice("protocol", ("TCP", "UDP", "SCTP"), "TCP"),
    )
    item.end()
    return port


def _is_address(text: str) -> bool:
    try:
        # A zone is part of an address to ipaddress, but to no port mapping.
        return not getattr(ipaddress.ip_address(text), "scope_id", None)
    except ValueError:
        return False


def _mounts(item: yamlread.Mapping, volumes: set[str]) -> tuple[model.VolumeMount, ...]:
    mounts = tuple(_mount(each, volumes) for each in item.mappings("volumeMounts"))
    seen: set[str] = set()
    for mount in mounts:
        if mount.path in seen:
            raise item.error("volumeMounts", f"has two mounts at {yamlread.shown(mount.path)}")
        seen.add(mount.path)
    return mounts


def _mount(item: yamlread.Mapping, volumes: set[str]) -> model.VolumeMount:
    name, path = item.required_text("name"), item.required_text("mountPath")
    if name not in volumes:
        raise item.error("name", f"is {name!r}, but the pod has no volume of that name")
    if ":" in path:
        raise item.error("mountPath", "must not contain ':'")
    mount = model.VolumeMount(name, path, bool(item.boolean("readOnly")))
    item.end()
    return mount


def _volume(item: yamlread.Mapping) -> model.Volume:
    name = _name(item, "name", model.DNS_LABEL, 63)
    empty, host = item.mapping("emptyDir"), item.mapping("hostPath")
    volume = model.Volume(name)
    if empty is not None and host is not None:
        raise item.error("", "must not be both an emptyDir and a hostPath")
    if empty is not None:
        if medium := empty.text("medium"):
            raise empty.error("medium", f"is {medium[:80]!r}, which is not supported")
        empty.end()
    elif host is not None:
        path = host.required_text("path")
        if not path.startswith("/") or ".." in path.split("/"):
            raise host.error("path", "must be an absolute path without '..'")
        types = ("", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice")
        volume = model.Volume(name, path, host.choice("type", types, ""))
        host.end()
    item.end()
    if empty is None and host is None:
        raise item.error("", "must be an emptyDir or a hostPath")
    return volume


def _seccomp(context: yamlread.Mapping) -> str:
    profile = context.mapping("seccompProfile")
    if profile is None:
        return ""
    kind = profile.choice("type", ("RuntimeDefault", "Unconfined"), "")
    profile.end()
    return kind


def _security(context: yamlread.Mapping) -> model.Security:
    """What a pod's and a container's security context have in common."""
    security = model.Security(
        run_as_user=context.integer("runAsUser", 0, _UID_MAX),
        run_as_group=context.integer("runAsGroup", 0, _UID_MAX),
        run_as_non_root=context.boolean("runAsNonRoot"),
        seccomp=_seccomp(context),
    )
    context.end()
    return security


def _container_security(context: yamlread.Mapping | None) -> model.Security:
    if context is None:
        return model.Security()
    privileged, read_only = bool(context.boolean("privileged")), bool(context.boolean("readOnlyRootFilesystem"))
    escalation = context.boolean("allowPrivilegeEscalation")
    changed = context.mapping("capabilities")
    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    if changed is not None:
        add, drop = _capabilities(changed, "add"), _capabilities(changed, "drop")
        changed.end()
    return dataclasses.replace(
        _security(context),
        privileged=privileged,
        read_only_root=read_only,
        no_new_privileges=escalation is False,
        add_capabilities=add,
        drop_capabilities=drop,
    )


def _capabilities(item: yamlread.Mapping, key: str) -> tuple[str, ...]:
    try:
        return tuple(map(capabilities.name, item.texts(key) or []))
    except ValueError as error:
        raise item.error(key, f"has {error}") from error


_PARSERS: Mapping[tuple[str, str], Callable[[str], int]] = {
    ("requests", "cpu"): lambda text: quantity.parse(text, 1000),
    ("limits", "cpu"): lambda text: quantity.parse(text, 1000),
    ("requests", "memory"): quantity.parse,
    ("limits", "memory"): quantity.memory_limit,
}


def _resources(item: yamlread.Mapping | None) -> model.Resources:
    if item is None:
        return model.Resources()
    figures = {}
    parts = {key: item.mapping(key) for key in ("requests", "limits")}
    for key, part in parts.items():
        for kind in ("cpu", "memory"):
            text = part.quantity(kind) if part is not None else ""
            try:
                figures[f"{kind}_{key[:-1]}"] = _PARSERS[key, kind](text) if text else 0
            except ValueError as error:
                assert part is not None
                raise part.error(kind, str(error)) from error
        if part is not None:
            part.end()
    item.end()
    for kind in ("cpu", "memory"):
        if 0 < figures[f"{kind}_limit"] < figures[f"{kind}_request"] and (requests := parts["requests"]) is not None:
            raise requests.error(kind, "must not be more than the limit")
    return model.Resources(**figures)


def restart_notices(pods: Sequence[model.Pod]) -> list[str]:
    """What there is to say about restart policies when nobody restarts anything."""
    return [
        f"pod {pod.name}: restartPolicy {pod.restart_policy}, but nothing restarts its containers without a kubelet"
        for pod in pods
        if pod.restart_policy != "Never"
    ]
