"""The arguments of a cluster's programs. Nothing listens but on loopback and the node's address, and nobody is let in unknown.

What a person adds (``--kube-apiserver-arg`` and its like) goes last and may change all of it.

Whoever lets somebody in believes one authority's own certificate and not its chain: several authorities may be below one root, and each is to
speak for its own only.
"""

import dataclasses
import os

from nixlet.cluster import arguments, subjects
from nixlet.cluster import settings as model
from nixlet.cluster.settings import ClusterSettings

_LOOPBACK = "127.0.0.1"

#: How kine opens its file: it and its readers go on beside each other, and wait for each other (milliseconds). Who means to write says so at once, as
#: kine's own default has it: a transaction that begins by reading isn't waited for, but refused, once somebody else has written. Each
#: commit is on the disk before it is acknowledged, where kine's default would leave the last ones to a power cut.
_SQLITE_OPTIONS = "_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate&_synchronous=FULL"


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """What a kubelet has to know of the node that it runs on.

    Attributes:
        runtime_socket: Where the container runtime answers.
        image_socket: Where the image service answers; empty: there as well.
        cgroup_driver: ``cgroupfs`` or ``systemd``, as the runtime has it.
        resolv_conf: The file that pods' name servers come from; empty: the kubelet's own choice.
        root_dir: The kubelet's directory; empty: its own choice, ``/var/lib/kubelet``.
        static_pods: The directory of manifests that it runs by itself; empty: none.
        pod_logs: The directory of pods' logs; empty: its own choice, ``/var/log/pods``.
        cgroup_root: The cgroup that those of all pods are in; empty: the topmost one.
        bootstraps: Its kubelet asks the cluster for certificates by itself, by ``agent/bootstrap.kubeconfig`` (Kubernetes: "TLS bootstrapping");
            otherwise it finds them.
    """

    runtime_socket: str
    image_socket: str = ""
    cgroup_driver: str = "cgroupfs"
    resolv_conf: str = ""
    root_dir: str = ""
    static_pods: str = ""
    pod_logs: str = ""
    cgroup_root: str = ""
    bootstraps: bool = False


def directories(settings: ClusterSettings) -> tuple[str, ...]:
    """The directories that the datastore's program wants to find, each with mode 0700."""
    places = settings.layout
    return (places.database, os.path.dirname(places.kine_socket))


def kine_endpoint(settings: ClusterSettings) -> str:
    """The database that kine keeps the cluster's state in. A secret: it may hold a password."""
    if settings.datastore_is_elsewhere:
        return settings.datastore_endpoint
    return f"sqlite://{settings.layout.database}/state.db?{_SQLITE_OPTIONS}"


def kine(settings: ClusterSettings, *, hidden: bool = False) -> list[str]:
    """kine: an etcd towards the API server, on a database.

    Args:
        settings: The cluster.
        hidden: The database is told it otherwise (``KINE_ENDPOINT``): all who are on the machine can read arguments.
    """
    places = settings.layout
    ours = {
        "endpoint": "" if hidden else kine_endpoint(settings),
        "listen-address": f"unix://{places.kine_socket}",
        # It would serve them on every address of the machine.
        "metrics-bind-address": "0",
        "ca-file": settings.datastore_cafile,
        "cert-file": settings.datastore_certfile,
        "key-file": settings.datastore_keyfile,
    }
    return arguments.merged(_given(ours), ())


def etcd(settings: ClusterSettings, members: tuple[str, ...] = (), *, joins: bool = False) -> list[str]:
    """etcd as a member of the cluster's datastore.

    Args:
        settings: The cluster.
        members: Other members, each as ``NAME=PEER URL``.
        joins: The others are there already.
    """
    places = settings.layout
    address = model.bracketed(settings.node_ip)
    peer = f"https://{address}:{model.ETCD_PEER_PORT}"
    clients = [f"https://{host}:{model.ETCD_CLIENT_PORT}" for host in (_LOOPBACK, address)]
    ours = {
        "name": settings.node_name,
        "data-dir": os.path.join(places.database, "etcd"),
        "listen-client-urls": ",".join(clients),
        "advertise-client-urls": clients[1],
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": ",".join((f"{settings.node_name}={peer}", *members)),
        "initial-cluster-state": "existing" if joins else "new",
        "listen-metrics-urls": f"http://{_LOOPBACK}:{model.ETCD_METRICS_PORT}",
        "client-cert-auth": "true",
        "trusted-ca-file": places.tls("etcd/server-ca.nochain.crt"),
        "cert-file": places.tls("etcd/server-client.crt"),
        "key-file": places.tls("etcd/server-client.key"),
        "peer-client-cert-auth": "true",
        "peer-trusted-ca-file": places.tls("etcd/peer-ca.nochain.crt"),
        "peer-cert-file": places.tls("etcd/peer-server-client.crt"),
        "peer-key-file": places.tls("etcd/peer-server-client.key"),
    }
    return arguments.merged(ours, settings.etcd_args)


def kube_apiserver(settings: ClusterSettings) -> list[str]:
    """kube-apiserver."""
    places = settings.layout
    issuer = f"https://kubernetes.default.svc.{settings.cluster_domain}"
    ours = {
        **_datastore(settings),
        "advertise-address": str(settings.advertise_address or settings.node_ip),
        "allow-privileged": "true",
        "anonymous-auth": "false",
        "api-audiences": f"{issuer},nixlet",
        "authorization-mode": "Node,RBAC",
        "bind-address": str(settings.node_ip),
        "secure-port": str(settings.https_listen_port),
        # What it would make by itself where certificates are missing: they aren't.
        "cert-dir": places.tls("temporary-certs"),
        "client-ca-file": places.tls("client-ca.nochain.crt"),
        "enable-admission-plugins": "NodeRestriction",
        "enable-bootstrap-token-auth": "true",
        "kubelet-certificate-authority": places.tls("server-ca.nochain.crt"),
        "kubelet-client-certificate": places.tls("client-kube-apiserver.crt"),
        "kubelet-client-key": places.tls("client-kube-apiserver.key"),
        # Nodes' names are in nobody's DNS.
        "kubelet-preferred-address-types": "InternalIP,ExternalIP,Hostname",
        "profiling": "false",
        "proxy-client-cert-file": places.tls("client-auth-proxy.crt"),
        "proxy-client-key-file": places.tls("client-auth-proxy.key"),
        "requestheader-allowed-names": subjects.FRONT_PROXY,
        "requestheader-client-ca-file": places.tls("request-header-ca.nochain.crt"),
        "requestheader-extra-headers-prefix": "X-Remote-Extra-",
        "requestheader-group-headers": "X-Remote-Group",
        "requestheader-username-headers": "X-Remote-User",
        "service-account-issuer": issuer,
        "service-account-key-file": places.tls("service.key"),
        "service-account-signing-key-file": places.tls("service.current.key"),
        "service-cluster-ip-range": _joined(settings.service_cidrs),
        "service-node-port-range": settings.service_node_port_range,
        # Otherwise it waits a minute for watches to end by themselves: pods and other nodes keep theirs.
        "shutdown-send-retry-after": "true",
        "tls-cert-file": places.tls("serving-kube-apiserver.crt"),
        "tls-private-key-file": places.tls("serving-kube-apiserver.key"),
        "encryption-provider-config": places.cred("encryption-config.json") if settings.secrets_encryption else "",
    }
    return arguments.merged(_given(ours), settings.kube_apiserver_args)


def _datastore(settings: ClusterSettings) -> dict[str, str]:
    places = settings.layout
    if settings.embedded_etcd:
        return {
            "etcd-servers": f"https://{_LOOPBACK}:{model.ETCD_CLIENT_PORT}",
            "etcd-cafile": places.tls("etcd/server-ca.nochain.crt"),
            "etcd-certfile": places.tls("etcd/client.crt"),
            "etcd-keyfile": places.tls("etcd/client.key"),
        }
    if not settings.datastore_is_etcd:
        return {"etcd-servers": f"unix://{places.kine_socket}"}
    return {
        "etcd-servers": settings.datastore_endpoint,
        "etcd-cafile": settings.datastore_cafile,
        "etcd-certfile": settings.datastore_certfile,
        "etcd-keyfile": settings.datastore_keyfile,
    }


def kube_controller_manager(settings: ClusterSettings) -> list[str]:
    """kube-controller-manager."""
    places = settings.layout
    ours = {
        **_beside_apiserver(settings, places.cred("controller.kubeconfig"), model.CONTROLLERS_PORT),
        "allocate-node-cidrs": "true",
        "cluster-cidr": _joined(settings.cluster_cidrs),
        # It makes some forty controllers, each with an account of its own, before the first begins: by its own pace (20 requests a second) that
        # takes four seconds of each start.
        "kube-api-qps": "100",
        "kube-api-burst": "200",
        "service-cluster-ip-range": _joined(settings.service_cidrs),
        # Bootstrap tokens that have ended go.
        "controllers": "*,tokencleaner",
        # Without it pods get the certificates that are embedded in its kubeconfig, and there are none.
        "root-ca-file": places.tls("server-ca.crt"),
        "service-account-private-key-file": places.tls("service.current.key"),
        "use-service-account-credentials": "true",
    }
    for signer, authority in (
        ("kube-apiserver-client", "client-ca"),
        ("kubelet-client", "client-ca"),
        ("kubelet-serving", "server-ca"),
        ("legacy-unknown", "client-ca"),
    ):
        # It takes one certificate and no chain.
        ours[f"cluster-signing-{signer}-cert-file"] = places.tls(f"{authority}.nochain.crt")
        ours[f"cluster-signing-{signer}-key-file"] = places.tls(f"{authority}.key")
    return arguments.merged(ours, settings.kube_controller_manager_args)


def kube_scheduler(settings: ClusterSettings) -> list[str]:
    """kube-scheduler."""
    ours = _beside_apiserver(settings, settings.layout.cred("scheduler.kubeconfig"), model.SCHEDULER_PORT)
    return arguments.merged(ours, settings.kube_scheduler_args)


def _beside_apiserver(settings: ClusterSettings, kubeconfig: str, port: int) -> dict[str, str]:
    return {
        "kubeconfig": kubeconfig,
        # Who asks for their metrics is known, and may do so, as the API server says; of their health anybody on the machine may ask.
        "authentication-kubeconfig": kubeconfig,
        "authorization-kubeconfig": kubeconfig,
        "bind-address": _LOOPBACK,
        "secure-port": str(port),
        "leader-elect": "true" if settings.shares_datastore else "false",
        "profiling": "false",
    }


def kubelet(settings: ClusterSettings, node: Node, config_dir: str) -> list[str]:
    """kubelet.

    Args:
        settings: The cluster.
        node: The node that it runs on.
        config_dir: The directory of the files (``*.conf``) that make up its configuration, that of ``kubelet.configuration`` among them.
    """
    ours = {
        "config-dir": config_dir,
        "kubeconfig": "" if settings.is_standalone else settings.layout.node("kubelet.kubeconfig"),
        "bootstrap-kubeconfig": settings.layout.node("bootstrap.kubeconfig") if node.bootstraps else "",
        "hostname-override": settings.node_name,
        "node-ip": "" if settings.is_standalone else _joined(settings.node_ips),
        "node-labels": ",".join(settings.node_labels),
        "root-dir": node.root_dir,
        "cert-dir": os.path.join(node.root_dir, "pki") if node.root_dir else "",
    }
    return arguments.merged(_given(ours), settings.kubelet_args)


def kube_proxy(settings: ClusterSettings) -> list[str]:
    """kube-proxy: by arguments only, since with a configuration file it would pass over all others, a person's too."""
    ours = {
        "kubeconfig": settings.layout.node("kubeproxy.kubeconfig"),
        "hostname-override": settings.node_name,
        # (no address that it listens at, but its idea of the node's own)
        "bind-address": str(settings.node_ip),
        "healthz-bind-address": f"{_LOOPBACK}:{model.PROXY_HEALTH_PORT}",
        "metrics-bind-address": f"{_LOOPBACK}:{model.PROXY_METRICS_PORT}",
        "proxy-mode": settings.proxy_mode,
        # Node ports are the node's own address's, and not those of all its networks.
        "nodeport-addresses": "primary",
        "cluster-cidr": _joined(settings.cluster_cidrs),
        # Zeros leave the machine's settings alone.
        "conntrack-max-per-core": "0",
        "conntrack-min": "0",
        "conntrack-tcp-timeout-established": "0s",
        "conntrack-tcp-timeout-close-wait": "0s",
    }
    return arguments.merged(ours, settings.kube_proxy_args)


def _joined(items: tuple[model.Address | model.Network, ...]) -> str:
    return ",".join(str(item) for item in items)


def _given(ours: dict[str, str]) -> dict[str, str]:
    """Without what has no value."""
    return {key: value for key, value in ours.items() if value}
