"""Keys and flags of k3s that mean nothing to a node of nixlet, each with the reason: a file that was written for k3s must start.

What somebody would miss is refused; what only tunes, or names a part that k3s brings along, is passed over with a warning.
"""

_BROUGHT = "nixlet brings no such component"
_SNAPSHOTS = "nixlet takes no snapshots of etcd; etcdctl snapshot save does"
_LOGS = "nixlet's own log has no such levels; --debug has it say more"
_PROGRAMS = "nixlet has no programs inside: they are found on PATH, or in --kubernetes-bin-dir"
_ONE_SERVER = "a cluster has one server"

#: What is passed over with a warning, and whether it is a truth value.
PASSED_OVER: dict[str, tuple[str, bool]] = {
    "disable-cloud-controller": (_BROUGHT, True),
    "disable-helm-controller": (_BROUGHT, True),
    "disable-network-policy": (_BROUGHT, True),
    "kube-cloud-controller-manager-arg": (_BROUGHT, False),
    "kube-cloud-controller-arg": (_BROUGHT, False),
    "servicelb-namespace": (_BROUGHT, False),
    "helm-job-image": (_BROUGHT, False),
    "default-local-storage-path": (_BROUGHT, False),
    "embedded-registry": (_BROUGHT, True),
    "flannel-cni-conf": ("pods are attached to their bridge by a configuration of nixlet's own", False),
    "flannel-ipv6-masq": ("flannel masquerades what pods send out of the cluster, whatever its IP version is", True),
    "flannel-external-ip": ("nodes are reached at --node-ip", True),
    "etcd-disable-snapshots": (_SNAPSHOTS, True),
    "etcd-snapshot-schedule-cron": (_SNAPSHOTS, False),
    "etcd-snapshot-retention": (_SNAPSHOTS, False),
    "etcd-snapshot-dir": (_SNAPSHOTS, False),
    "etcd-snapshot-name": (_SNAPSHOTS, False),
    "etcd-snapshot-compress": (_SNAPSHOTS, True),
    "etcd-expose-metrics": ("etcd's metrics are served on the loopback address alone, at port 2381", True),
    "supervisor-metrics": ("the node's metrics are served where --health-address says", True),
    "enable-pprof": (_LOGS, True),
    "alsologtostderr": (_LOGS, True),
    "v": (_LOGS, False),
    "vmodule": (_LOGS, False),
    "prefer-bundled-bin": (_PROGRAMS, True),
    "lb-server-port": ("nothing balances between servers: " + _ONE_SERVER, False),
    "disable-apiserver-lb": ("nothing balances between servers: " + _ONE_SERVER, True),
    "egress-selector-mode": ("the API server reaches kubelets at their addresses", False),
    "bind-address": ("the API server listens at the node's address alone: see --node-ip and --advertise-address", False),
    "tls-san-security": ("no name is taken up into a certificate but those that are said", True),
    "kine-tls": ("kine is reached through a socket that is root's alone", True),
    "node-external-ip": ("nodes are reached at --node-ip", False),
    "node-internal-dns": ("nodes are reached at --node-ip", False),
    "node-external-dns": ("nodes are reached at --node-ip", False),
    "with-node-id": ("a node is called as --node-name says", True),
    "protect-kernel-defaults": ("--kubelet-arg protect-kernel-defaults=true says the same", True),
}  # fmt: skip

#: What is refused, and whether it is a truth value.
REFUSED: dict[str, tuple[str, bool]] = {
    "docker": ("pods run in containerd", True),
    "cluster-reset": (_ONE_SERVER + ", so there is nothing to reset it from", True),
    "cluster-reset-restore-path": (_SNAPSHOTS, False),
    "etcd-s3": (_SNAPSHOTS, True),
    "disable-apiserver": (_ONE_SERVER + ", which has all parts of it", True),
    "disable-etcd": (_ONE_SERVER + ", which has all parts of it", True),
    "vpn-auth": ("nodes are not joined through a VPN of nixlet's", False),
    "vpn-auth-file": ("nodes are not joined through a VPN of nixlet's", False),
    "image-credential-provider-bin-dir": ("--kubelet-arg image-credential-provider-bin-dir=DIR says it to the kubelet", False),
    "image-credential-provider-config": ("--kubelet-arg image-credential-provider-config=FILE says it to the kubelet", False),
    "kube-controller-arg": ("it is called kube-controller-manager-arg", False),
}  # fmt: skip
