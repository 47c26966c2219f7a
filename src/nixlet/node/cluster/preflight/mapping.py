"""From a node's settings to those of its cluster."""

import logging
import os
import socket

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.cluster import tokens, validation
from nixlet.host import network
from nixlet.node.cluster.preflight import finding
from nixlet.node.requirements import plugins
from nixlet.node.settings import config as node_config
from nixlet.node.settings import kubeletfiles, names, trusted

#: Where the administrator's kubeconfig goes on a machine with one node.
_KUBECONFIG = "/etc/nixlet/kubeconfig.yaml"

#: Files of one line are no longer than this (bytes).
_MAX_TOKEN_FILE = 4096

#: A kubelet's directory is no longer than this: in it are sockets, as ``pod-resources/`` and a number of ten digits, and their paths end at 107
#: bytes (unix(7)).
_MAX_KUBELET_DIR = 107 - len("/pod-resources/0123456789")

#: The label of nodes that run images of store paths.
NIX_IMAGES = "nixlet.io/nix-images"

_log = logging.getLogger("nixlet.cluster")


def cluster_settings(settings: node_config.Settings, found: finding.Found, proxy_mode: str) -> model.ClusterSettings:
    """The settings of the cluster that a server is.

    Args:
        settings: The node's.
        found: The cluster's programs.
        proxy_mode: How kube-proxy is to work.

    Raises:
        InvalidArgumentError: They make no cluster.
        FailedPreconditionError: The machine has no address that a node can have.
        NixletError: As ``kubelet_files``.
    """
    advertised = _addresses(settings, "advertise_address")
    if len(advertised) > 1:
        raise errors.InvalidArgumentError("advertise-address names more than one address")
    made = model.ClusterSettings(
        data_dir=settings.data_dir,
        state_dir=settings.state_dir,
        node_name=settings.node_name or socket.gethostname().lower(),
        node_ips=_addresses(settings, "node_ip") or (_own_address(settings),),
        cluster_cidrs=_networks(settings, "cluster_cidr"),
        service_cidrs=_networks(settings, "service_cidr"),
        cluster_dns=_addresses(settings, "cluster_dns"),
        cluster_domain=settings.cluster_domain,
        tls_sans=tuple(part.strip() for text in settings.tls_san for part in text.split(",") if part.strip()),
        https_listen_port=int(settings.https_listen_port),
        advertise_address=advertised[0] if advertised else None,
        service_node_port_range=settings.service_node_port_range,
        datastore_endpoint=settings.datastore_endpoint,
        datastore_cafile=settings.datastore_cafile,
        datastore_certfile=settings.datastore_certfile,
        datastore_keyfile=settings.datastore_keyfile,
        embedded_etcd=found.datastore == finding.ETCD,
        # (whoever takes over from one that was killed would otherwise wait until its lease has ended)
        is_only_server=not settings.cluster_init,
        secrets_encryption=settings.secrets_encryption,
        proxy_mode=proxy_mode,
        node_labels=(*_own_labels(settings), *settings.node_label),
        node_taints=tuple(settings.node_taint),
        etcd_args=tuple(settings.etcd_arg),
        kube_apiserver_args=tuple(settings.kube_apiserver_arg),
        kube_controller_manager_args=tuple(settings.kube_controller_manager_arg),
        kube_scheduler_args=tuple(settings.kube_scheduler_arg),
        kubelet_args=kubelet_args(settings),
        kube_proxy_args=tuple(settings.kube_proxy_arg),
        kubelet_files=kubelet_files(settings),
    )
    if len(made.cluster_cidrs) > 1:
        raise errors.UnsupportedError(
            "cluster-cidr names two networks, and a node's pods get addresses of one IP version only",
            hint="name one of them",
        )
    # (a node that joins learns from its cluster which networks there are)
    validation.check(made, joins=bool(settings.server or settings.kubeconfig))
    return made


def _own_labels(settings: node_config.Settings) -> tuple[str, ...]:
    """What the node says of itself, for pods that need it; a person's word on it counts more."""
    plugin = plugins.of(settings, settings.layout)
    said = any(each.startswith(f"{NIX_IMAGES}=") for each in settings.node_label)
    if plugin is None or not plugin.is_ours or said:
        return ()
    return (f"{NIX_IMAGES}=true",)


def kubelet_args(settings: node_config.Settings) -> tuple[str, ...]:
    """The kubelet's arguments without its configuration file, which ``preparing`` puts among the others."""
    found = []
    for argument in settings.kubelet_arg:
        key, _, value = argument.removeprefix("--").partition("=")
        if key == "root-dir" and not os.path.isabs(value):
            raise errors.InvalidArgumentError(
                f"kubelet-arg root-dir {value!r} is no absolute path", hint="as in root-dir=/var/lib/kubelet"
            )
        if key == "config-dir":
            raise errors.InvalidArgumentError(
                "kubelet-arg config-dir: the kubelet's configuration has a directory already",
                hint=f"put the files into {os.path.join(settings.data_dir, 'agent', 'etc', 'kubelet.conf.d')}",
            )
        if key == "config" and not os.path.isabs(value):
            raise errors.InvalidArgumentError("kubelet-arg config names no file", hint="as in config=/etc/kubelet.yaml")
        if key != "config":
            found.append(argument)
    directory = node_config.kubelet_argument(settings, "root-dir") or os.path.join(
        settings.data_dir, "agent", "kubelet"
    )
    if len(os.fsencode(directory)) > _MAX_KUBELET_DIR and not settings.disable_agent:
        raise errors.InvalidArgumentError(
            f"the kubelet's directory {directory} is longer than {_MAX_KUBELET_DIR} characters, which the paths of its sockets don't allow",
            hint="name a shorter one: --kubelet-arg root-dir=DIRECTORY; or a shorter --data-dir",
        )
    return tuple(found)


def kubelet_files(settings: node_config.Settings) -> tuple[str, ...]:
    """What files say that a person has put there for the kubelet, as arguments.

    Raises:
        UsageError: One can't be read, or is no mapping in YAML.
        PermissionDeniedError: Somebody else can write one.
    """
    return tuple(f"{name}={value}" for name, value in kubeletfiles.said(settings, settings.layout).items())


def _addresses(settings: node_config.Settings, name: str) -> tuple[model.Address, ...]:
    return model.addresses(_joined(settings, name), what=names.key(name))


def _networks(settings: node_config.Settings, name: str) -> tuple[model.Network, ...]:
    return model.networks(_joined(settings, name), what=names.key(name))


def _joined(settings: node_config.Settings, name: str) -> str:
    value = getattr(settings, name)
    return value if isinstance(value, str) else ",".join(value)


def _own_address(settings: node_config.Settings) -> model.Address:
    # k3s takes it as well where there is one.
    for each in network.addresses(settings.flannel_iface) if settings.flannel_iface else ():
        if not validation.address_problem(each.ip):
            return each.ip
    found = network.outgoing_address()
    if found is not None and not validation.address_problem(found):
        return found
    # A machine without a default route: whatever it is reached at.
    for _, name in socket.if_nameindex():
        if name == settings.bridge:
            continue
        for each in network.addresses(name):
            if not validation.address_problem(each.ip):
                return each.ip
    raise errors.FailedPreconditionError(
        "this machine has no address that a node of a cluster can have: pods and other machines reach it there",
        hint="give it one, and name it with --node-ip; or run the node alone: --kubernetes no",
    )


def given_tokens(settings: node_config.Settings) -> tuple[str, str]:
    """The tokens that a person has given, the server's and the agents'; empty where none was.

    Raises:
        UsageError: A file can't be read.
        PermissionDeniedError: Somebody else can write it.
        InvalidArgumentError: It holds no token.
    """
    return _token(settings.token, settings.token_file), _token(settings.agent_token, settings.agent_token_file)


def _token(text: str, path: str) -> str:
    if not path:
        return text
    # Whoever can change the file lets in whom they want.
    read = trusted.read(path, _MAX_TOKEN_FILE).decode("ascii", "replace").strip()
    try:
        tokens.parse(read)
    except errors.InvalidArgumentError as error:
        raise errors.InvalidArgumentError(f"{path} holds no token: {error.message}", hint=error.hint) from None
    return read


def kubeconfig_path(settings: node_config.Settings) -> str:
    """Where the administrator's kubeconfig goes: on a machine with several nodes each has its own."""
    if settings.write_kubeconfig:
        return settings.write_kubeconfig
    if settings.data_dir == names.DEFAULT_DATA_DIR:
        return _KUBECONFIG
    return os.path.join(settings.data_dir, "kubeconfig.yaml")
