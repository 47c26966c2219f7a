"""The cluster's DNS: CoreDNS as a Deployment, behind the Service whose address every kubelet gives its pods.

Names are those that Kubernetes' own tools expect, and k3s's where they go beyond (https://kubernetes.io/docs/tasks/administer-cluster/dns-custom-nameservers).
"""

from collections.abc import Mapping
from typing import NamedTuple

from nixlet.cluster import nodehosts
from nixlet.cluster.settings import ClusterSettings
from nixlet.encoding import yamlwrite

NAMESPACE = "kube-system"

#: The name of the manifest, without its ending: what ``--disable`` calls it.
NAME = "coredns"

#: The ports where it answers for its health, whether it is ready, and with figures (CoreDNS' plugins health, ready, prometheus).
_HEALTH_PORT, _READY_PORT, _METRICS_PORT = 8080, 8181, 9153

#: Where its configuration is in its container, and what people add to it (as k3s has it).
_CONFIG_DIR, _CUSTOM = "/etc/coredns", "coredns-custom"

_LABELS = {"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"}
_ROLE = "system:coredns"

_Fields = Mapping[str, yamlwrite.Value]


class Image(NamedTuple):
    """What its containers run.

    Attributes:
        reference: The image.
        node: The only node that has it, which pulls it from nowhere; empty: any node pulls it.
    """

    reference: str
    node: str = ""


def manifest(settings: ClusterSettings, image: Image, *, forwards: bool) -> str:
    """All objects of it, as YAML; the same bytes for the same arguments.

    Args:
        settings: The cluster.
        image: What it runs.
        forwards: Whether its nodes know name servers for the names of the world outside; without any it knows the cluster's alone.
    """
    objects: tuple[_Fields, ...] = (
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _named(NAME)},
        _role(),
        _binding(),
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": _named(NAME),
            "data": {"Corefile": corefile(settings.cluster_domain, forwards=forwards)},
        },
        _deployment(image),
        _service(settings),
    )
    return "---\n".join(map(yamlwrite.document, objects))


def corefile(domain: str, *, forwards: bool) -> str:
    """CoreDNS's own configuration.

    Args:
        domain: The cluster's domain.
        forwards: As in ``manifest``.
    """
    lines = [
        ".:53 {",
        "    errors",
        "    health {",
        "        lameduck 5s",
        "    }",
        "    ready",
        f"    kubernetes {domain} in-addr.arpa ip6.arpa {{",
        "        pods insecure",
        "        fallthrough in-addr.arpa ip6.arpa",
        "    }",
        # As long as an answer may be old, and how often the file is looked at, as k3s has both. There may be no such file.
        f"    hosts {_CONFIG_DIR}/{nodehosts.KEY} {{",
        "        ttl 60",
        "        reload 15s",
        "        fallthrough",
        "    }",
        f"    prometheus :{_METRICS_PORT}",
        "    cache 30",
        "    loop",
        "    reload",
        "    loadbalance",
        f"    import {_CONFIG_DIR}/custom/*.override",
        *(["    forward . /etc/resolv.conf"] if forwards else []),
        "}",
        f"import {_CONFIG_DIR}/custom/*.server",
    ]
    return "".join(f"{line}\n" for line in lines)


def _named(name: str, labels: Mapping[str, str] | None = None) -> _Fields:
    return {"name": name, "namespace": NAMESPACE, **({"labels": labels} if labels else {})}


def _role() -> _Fields:
    rules: list[yamlwrite.Value] = [
        {"apiGroups": [group], "resources": resources, "verbs": ["list", "watch"]}
        for group, resources in (
            ("", ["services", "pods", "namespaces"]),
            ("discovery.k8s.io", ["endpointslices"]),
        )
    ]
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": _ROLE},
        "rules": rules,
    }


def _binding() -> _Fields:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": _ROLE},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": _ROLE},
        "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}],
    }


def _deployment(image: Image) -> _Fields:
    # How many there are is left to people: what isn't said stays as they have it.
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _named(NAME, _LABELS),
        "spec": {
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
            "selector": {"matchLabels": {"k8s-app": _LABELS["k8s-app"]}},
            "template": {"metadata": {"labels": {"k8s-app": _LABELS["k8s-app"]}}, "spec": _pod(image)},
        },
    }


def _pod(image: Image) -> _Fields:
    where = {"kubernetes.io/os": "linux"} | ({"kubernetes.io/hostname": image.node} if image.node else {})
    tolerated: list[yamlwrite.Value] = [
        {"key": "CriticalAddonsOnly", "operator": "Exists"},
        {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists", "effect": "NoSchedule"},
    ]
    volumes: list[yamlwrite.Value] = [
        {"name": "config", "configMap": {"name": NAME}},
        {"name": "custom", "configMap": {"name": _CUSTOM, "optional": True}},
    ]
    return {
        "priorityClassName": "system-cluster-critical",
        "serviceAccountName": NAME,
        "nodeSelector": where,
        "tolerations": tolerated,
        # Its own server would answer it.
        "dnsPolicy": "Default",
        "containers": [_container(image)],
        "volumes": volumes,
    }


def _container(image: Image) -> _Fields:
    return {
        "name": NAME,
        "image": image.reference,
        "imagePullPolicy": "Never" if image.node else "IfNotPresent",
        "args": ["-conf", f"{_CONFIG_DIR}/Corefile"],
        "ports": [
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
            {"name": "dns-tcp", "containerPort": 53, "protocol": "TCP"},
            {"name": "metrics", "containerPort": _METRICS_PORT, "protocol": "TCP"},
        ],
        "livenessProbe": {
            **_asked("/health", _HEALTH_PORT),
            "initialDelaySeconds": 60,
            "timeoutSeconds": 5,
            "failureThreshold": 5,
        },
        "readinessProbe": {**_asked("/ready", _READY_PORT), "periodSeconds": 2},
        "resources": {"requests": {"cpu": "100m", "memory": "70Mi"}, "limits": {"memory": "170Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"add": ["NET_BIND_SERVICE"], "drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "config", "mountPath": _CONFIG_DIR, "readOnly": True},
            {"name": "custom", "mountPath": f"{_CONFIG_DIR}/custom", "readOnly": True},
        ],
    }


def _asked(path: str, port: int) -> dict[str, yamlwrite.Value]:
    return {"httpGet": {"path": path, "port": port}}


def _service(settings: ClusterSettings) -> _Fields:
    addresses = [str(address) for address in settings.dns_addresses]
    families = [f"IPv{address.version}" for address in settings.dns_addresses]
    ports: list[yamlwrite.Value] = [
        {"name": name, "port": port, "targetPort": name, "protocol": protocol}
        for name, port, protocol in (("dns", 53, "UDP"), ("dns-tcp", 53, "TCP"), ("metrics", _METRICS_PORT, "TCP"))
    ]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        # The name is older than CoreDNS.
        "metadata": _named("kube-dns", {**_LABELS, "kubernetes.io/cluster-service": "true"}),
        "spec": {
            "selector": {"k8s-app": _LABELS["k8s-app"]},
            "clusterIP": addresses[0],
            "clusterIPs": addresses,
            "ipFamilies": families,
            "ipFamilyPolicy": "RequireDualStack" if len(addresses) > 1 else "SingleStack",
            "ports": ports,
        },
    }
