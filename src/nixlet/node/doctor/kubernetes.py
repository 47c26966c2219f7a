"""What a node needs to be a cluster, where it is one or would be."""

import asyncio
import contextlib
import dataclasses
import datetime
import functools
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.host import files, network
from nixlet.node.children import cgroupdriver
from nixlet.node.cluster.children import preparing
from nixlet.node.cluster.network import podnetwork
from nixlet.node.cluster.preflight import finding, kernel, mapping, ports, versions
from nixlet.node.doctor import machine, netprobe
from nixlet.node.settings import config as node_config
from nixlet.node.settings import kubeletfiles

if TYPE_CHECKING:
    from nixlet.cluster import findings

#: What to do where the cluster's state has no room. (The store's garbage and images are on other disks often enough.)
_ROOM = "make room there, or give it a larger disk: the cluster goes on by itself then"

Look = Callable[[], "str | Awaitable[str]"]


def looks(settings: node_config.Settings) -> Mapping[str, Look]:
    """A look at each thing, by name."""
    try:
        found = finding.find(settings)
    except errors.NixletError as error:
        return {"programs": functools.partial(_missing, error)}
    if found is None:
        return {"cluster": lambda: "the node is alone: Kubernetes' programs are not all there, or not wanted"}
    if settings.kubernetes == node_config.KUBELET:
        return _of_kubelet(settings, found)
    cluster = functools.partial(_cluster, settings, found)
    if settings.server or settings.kubeconfig:
        return {
            "programs": functools.partial(_programs, found, settings.layout),
            "settings": lambda: _node(cluster()),
            "cluster": functools.partial(_joined, settings),
            "services": functools.partial(_services, found),
            "flannel": functools.partial(_flannel, settings, found),
            "certificates": functools.partial(_given_certificates, settings, cluster),
            "ports": lambda: _ports(cluster(), found, settings.layout),
            "kubelet": lambda: _kubelet(settings),
        }
    return {
        "programs": functools.partial(_programs, found, settings.layout),
        "settings": lambda: _address(cluster()),
        "datastore": lambda: _datastore(cluster(), found),
        "services": functools.partial(_services, found),
        "flannel": functools.partial(_flannel, settings, found),
        "route": lambda: _route(cluster()),
        "certificates": lambda: _certificates(cluster()),
        "ports": lambda: _ports(cluster(), found, settings.layout),
        "kubeconfig": lambda: mapping.kubeconfig_path(settings),
        "kubelet": lambda: _kubelet(settings),
    }


def _of_kubelet(settings: node_config.Settings, found: finding.Found) -> Mapping[str, Look]:
    """What a kubelet without a cluster needs."""

    def cluster() -> model.ClusterSettings:
        from nixlet.node.cluster.roles import standalone  # noqa: PLC0415 (a node of a cluster needs none of it)

        return standalone.cluster_settings(settings)

    manifests = preparing.static_pods(settings.layout)
    return {
        "programs": functools.partial(_programs, found, settings.layout),
        "settings": lambda: f"node {cluster().node_name}, without a cluster; its pods' manifests are in {manifests}",
        "ports": lambda: _ports(cluster(), found, settings.layout),
        "kubelet": lambda: _kubelet(settings),
    }


def with_pods(settings: node_config.Settings) -> node_config.Settings:
    """The settings with the network that pods have in a cluster, or will have a part of."""
    with contextlib.suppress(errors.NixletError):
        if settings.kubernetes != node_config.KUBELET and finding.find(settings) is not None:
            given = podnetwork.remembered(settings.layout) or str(
                model.networks(",".join(settings.cluster_cidr), what="")[0]
            )
            return dataclasses.replace(settings, pod_cidr=given)
    return settings


def _missing(error: errors.NixletError) -> str:
    raise error


def _cluster(settings: node_config.Settings, found: finding.Found) -> model.ClusterSettings:
    return mapping.cluster_settings(settings, found, kernel.IPTABLES)


async def _programs(found: finding.Found, layout: node_config.Layout) -> str:
    said = await versions.checked(found, layout)
    return ", ".join(f"{name} {said[name] or 'of no version'}" for name in found.programs)


def _node(cluster: model.ClusterSettings) -> str:
    return f"node {cluster.node_name} at {', '.join(map(str, cluster.node_ips))}"


def _address(cluster: model.ClusterSettings) -> str:
    return f"{_node(cluster)}, API server at {cluster.server_url}"


def _datastore(cluster: model.ClusterSettings, found: finding.Found) -> str:
    """Where the state is, and whether there is room for it."""
    if found.datastore == finding.ELSEWHERE or cluster.datastore_is_elsewhere:
        return "the cluster's state is elsewhere"
    directory = cluster.layout.database
    while not os.path.exists(directory):
        directory = os.path.dirname(directory)
    return f"{found.datastore}: {machine.space(directory, remedy=_ROOM)}"


async def _joined(settings: node_config.Settings) -> str:
    """Where an agent joins, and whether somebody is there."""
    if settings.kubeconfig:
        from nixlet.cluster import kubeconfigs  # noqa: PLC0415 (a node alone reads none)

        config = await asyncio.to_thread(kubeconfigs.read, settings.kubeconfig)
        return f"the kubelet asks {config.server} for its certificates"
    from nixlet.kubeclient import joining  # noqa: PLC0415 (TLS and X.509 take their time)

    server = joining.server_url(settings.server)
    if await asyncio.to_thread(joining.is_ours, server):
        return f"a server of nixlet's lets nodes in for {server}"
    raise machine.Worse(
        f"no server of nixlet's answers where nodes would join for {server}",
        "a bootstrap token leads to a cluster that isn't nixlet's; a node that has joined before starts all the same",
    )


async def _given_certificates(settings: node_config.Settings, cluster: Callable[[], model.ClusterSettings]) -> str:
    """The certificates of an agent."""
    from nixlet.cluster import standing  # noqa: PLC0415 (X.509 takes its time)

    places = cluster().layout
    # (a kubelet that asks for its certificates by itself keeps them by itself)
    if settings.kubeconfig or not os.path.exists(places.node("client-kubelet.crt")):
        return "the cluster gives them"
    return _told(
        await asyncio.to_thread(standing.check, places, datetime.datetime.now(datetime.UTC)),
        "the node gets new ones from its server while it runs, or when it starts: its log says why it hasn't",
    )


async def _services(found: finding.Found) -> str:
    if "kube-proxy" not in found.programs:
        return "nothing of ours makes them"
    mode = await kernel.proxy_mode()
    if mode == kernel.IPTABLES:
        raise machine.Worse(
            "kube-proxy makes them with iptables, which gets slow with many of them",
            "install nftables 1.0.1 or later, on Linux 5.13 or later",
        )
    return f"kube-proxy makes them with {mode}"


async def _flannel(settings: node_config.Settings, found: finding.Found) -> str:
    """Whether pods reach each other from node to node."""
    if settings.kubeconfig or settings.container_runtime_endpoint:
        return "the network of pods isn't nixlet's"
    program = found.programs.get(finding.FLANNEL, "")
    if settings.server and not program:
        hint = finding.missing_flannel("").hint
        raise machine.Worse("flanneld is not there, and the cluster may want it", hint)
    if not settings.server and found.flannel == "none":
        return "nothing of nixlet's brings pods' packets to other nodes"
    if settings.server or found.flannel == "vxlan":
        return f"{program or 'the agents'}: {await netprobe.vxlan()}"
    return f"{program or 'the agents'}: routes to other nodes, which have to be in one network ({found.flannel})"


def _route(cluster: model.ClusterSettings) -> str:
    """The kernel looks for a way to an address before the proxy's rules lead it elsewhere: without a default route there is none."""
    address = cluster.kubernetes_addresses[0]
    if address.version == 4 and network.outgoing_address(str(address)) is None:
        raise machine.Worse(
            f"this machine has no route to {cluster.service_cidrs[0]}: services are reached from pods, and not from the node itself",
            f"give it a default route, or one for services: ip route add {cluster.service_cidrs[0]} dev INTERFACE",
        )
    return f"services at {cluster.service_cidrs[0]} can be reached from here"


async def _certificates(cluster: model.ClusterSettings) -> str:
    from nixlet.cluster import findings  # noqa: PLC0415 (X.509 takes its time)

    found = await asyncio.to_thread(findings.check, cluster, datetime.datetime.now(datetime.UTC))
    missing = findings.State.MISSING
    if all(each.state is missing for each in found):
        return "they are made at the first start"
    authorities = [each for each in found if each.service == findings.AUTHORITIES]
    was_signed = any(each.state is not missing for each in found if each not in authorities)
    passable = {findings.State.VALID, findings.State.ENDING, *(() if was_signed else (missing,))}
    if bad := [each for each in authorities if each.state not in passable]:
        raise errors.FailedPreconditionError(
            f"no node starts with this authority: {_listed(bad)}",
            hint="bring both of its files back from a backup; of one that isn't valid yet, or ended, look at the clock first",
        )
    return _told(
        found,
        "the node makes anew what is not an authority's while it runs, or when it starts: its log says why it hasn't",
    )


def _told(found: "list[findings.Finding]", hint: str) -> str:
    """How certificates are, for a line."""
    # (a state is its word)
    bad = [each for each in found if each.state != "valid"]
    if bad:
        raise machine.Worse(_listed(bad), hint)
    ends = min(each.not_after for each in found if each.not_after is not None)
    return f"{len(found)} are valid; the first ends on {ends:%Y-%m-%d}"


def _listed(bad: "list[findings.Finding]") -> str:
    what = "; ".join(f"{each.file}: {each.state}{f' ({each.detail})' if each.detail else ''}" for each in bad[:3])
    return f"{what}; and {len(bad) - 3} more" if len(bad) > 3 else what


def _ports(cluster: model.ClusterSettings, found: finding.Found, layout: node_config.Layout) -> str:
    """Whether the ports are free that a cluster needs; a node that runs has them."""
    holder = files.holder(layout.lock)
    if holder:
        return f"up to the node that runs (process {holder})"
    wanted = ports.of_node(cluster, found.programs)
    ports.check(wanted)
    return f"{len(wanted)} are free"


def _kubelet(settings: node_config.Settings) -> str:
    places = f"its directory is {preparing.kubelet_dir(settings)}, its drop-ins go to {kubeletfiles.directory(settings.layout)}"
    # (what a node would choose depends on whether systemd starts it)
    driver = "" if settings.container_runtime_endpoint else cgroupdriver.written(settings.layout)
    remarks = [f"its cgroup driver is {driver}" if driver else "", kernel.remark_on_cgroups()]
    return "; ".join([places, *filter(None, remarks)])
