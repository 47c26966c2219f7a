"""A kubelet without a cluster: it runs the pods whose manifests are in ``agent/pod-manifests``, and asks nobody."""

import contextlib
import ipaddress
import logging
import socket

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.cluster import validation
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import children as host_children
from nixlet.node.cluster.children import preparing
from nixlet.node.cluster.preflight import finding, mapping
from nixlet.node.cluster.roles import node
from nixlet.node.settings import config as node_config

#: An address of this machine's alone: nobody reaches the kubelet.
_NOBODYS = ipaddress.ip_address("127.0.0.1")

_log = logging.getLogger("nixlet.cluster")


class Standalone(node.Node):
    """A node whose kubelet has no cluster. Its pods' network is that of a node alone."""

    starts = "the kubelet, without a cluster"

    async def _settle(self, stack: contextlib.AsyncExitStack, children: host_children.Children) -> None:
        await super()._settle(stack, children)
        _log.info("the kubelet runs the pods whose manifests are in %s", preparing.static_pods(self._layout))


def cluster_settings(settings: node_config.Settings) -> ClusterSettings:
    """What a kubelet's own settings are without a cluster.

    Raises:
        InvalidArgumentError: It can't have the node's name, or one of its arguments; or an address is none.
        NixletError: As ``mapping.kubelet_files``.
    """
    name = settings.node_name or socket.gethostname().lower()
    if problem := validation.node_name_problem(name):
        raise errors.InvalidArgumentError(
            f"{name!r} can't be a node's name: {problem}", hint="--node-name gives it another one"
        )
    made = ClusterSettings(
        data_dir=settings.data_dir,
        state_dir=settings.state_dir,
        node_name=name,
        node_ips=(_NOBODYS,),
        cluster_dns=model.addresses(",".join(settings.cluster_dns), what="cluster-dns"),
        cluster_domain=settings.cluster_domain,
        kubelet_args=mapping.kubelet_args(settings),
        kubelet_files=mapping.kubelet_files(settings),
        is_standalone=True,
    )
    validation.check_arguments(made)
    return made


def of(settings: node_config.Settings, found: finding.Found) -> Standalone:
    """The node.

    Raises:
        NixletError: As ``cluster_settings``.
    """
    return Standalone(settings, found, cluster_settings(settings))
