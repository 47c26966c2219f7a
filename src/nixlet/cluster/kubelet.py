"""A kubelet's configuration file (kubelet.config.k8s.io/v1beta1)."""

from nixlet.cluster import settings as model
from nixlet.cluster.programs import Node
from nixlet.cluster.settings import ClusterSettings
from nixlet.encoding import yamlwrite


def configuration(settings: ClusterSettings, node: Node) -> str:
    """What a kubelet is to do: as k3s has it, but on one address. It may be read by everybody."""
    config: dict[str, yamlwrite.Value] = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "readOnlyPort": 0,
        "healthzBindAddress": "127.0.0.1",
        "healthzPort": model.KUBELET_HEALTH_PORT,
        **(_unserved() if settings.is_standalone else _served(settings, node)),
        "containerRuntimeEndpoint": _socket(node.runtime_socket),
        "imageServiceEndpoint": _socket(node.image_socket or node.runtime_socket),
        "clusterDNS": [
            str(address) for address in (settings.cluster_dns if settings.is_standalone else settings.dns_addresses)
        ],
        "clusterDomain": settings.cluster_domain,
        "cgroupDriver": node.cgroup_driver,
        # What it refuses by itself is what many machines have, and works.
        "failCgroupV1": False,
        "failSwapOn": False,
        "serializeImagePulls": False,
        "evictionHard": {"imagefs.available": "5%", "nodefs.available": "5%"},
        "evictionMinimumReclaim": {"imagefs.available": "10%", "nodefs.available": "10%"},
    }
    chosen = {
        "resolvConf": node.resolv_conf,
        "staticPodPath": node.static_pods,
        "podLogsDir": node.pod_logs,
        "cgroupRoot": node.cgroup_root,
    }
    config |= {key: value for key, value in chosen.items() if value}
    if settings.node_taints:
        config["registerWithTaints"] = [model.taint(text) for text in settings.node_taints]
    return yamlwrite.document(config)


def _served(settings: ClusterSettings, node: Node) -> dict[str, yamlwrite.Value]:
    """Where it listens, what it shows there, and whom it lets in."""
    places = settings.layout
    certificates: dict[str, yamlwrite.Value] = {
        "tlsCertFile": places.node("serving-kubelet.crt"),
        "tlsPrivateKeyFile": places.node("serving-kubelet.key"),
    }
    return {
        "address": str(settings.node_ip),
        "port": model.KUBELET_PORT,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True, "cacheTTL": "2m0s"},
            "x509": {"clientCAFile": places.node("client-ca.crt")},
        },
        "authorization": {
            "mode": "Webhook",
            "webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"},
        },
        **({"rotateCertificates": True} if node.bootstraps else certificates),
    }


def _unserved() -> dict[str, yamlwrite.Value]:
    """It serves nobody: without an API server it could ask nobody who may come in."""
    return {
        "enableServer": False,
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
    }


def _socket(path: str) -> str:
    return path if path.startswith("unix://") else f"unix://{path}"
