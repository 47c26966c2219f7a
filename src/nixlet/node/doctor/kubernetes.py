"""What a node needs to be a cluster, where it is one or would be."""

import asyncio
import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Awaitable, Callable, Mapping

from nixlet import errors
from nixlet.cluster import settings as model
from nixlet.host import files
from nixlet.node.cluster import finding, kernel, mapping, podnetwork, ports, preparing, versions
from nixlet.node.doctor import machine
from nixlet.node.settings import config as node_config

Look = Callable[[], "str | Awaitable[str]"]


def looks(settings: node_config.Settings, layout: node_config.Layout) -> Mapping[str, Look]:
    """A look at each thing, by name."""
    try:
        found = finding.find(settings, layout)
    except errors.NixletError as error:
        return {"programs": functools.partial(_missing, error)}
    if found is None:
        return {"cluster": lambda: "the node is alone: Kubernetes' programs are not all there, or not wanted"}
    cluster = functools.partial(_cluster, settings, found)
    return {
        "programs": functools.partial(_programs, found, layout),
        "settings": lambda: _address(cluster()),
        "services": functools.partial(_services, found),
        "certificates": lambda: _certificates(cluster()),
        "ports": lambda: _ports(cluster(), found, layout),
        "kubeconfig": lambda: mapping.kubeconfig_path(settings),
        "kubelet": lambda: _kubelet(settings, layout),
    }


def with_pods(settings: node_config.Settings, layout: node_config.Layout) -> node_config.Settings:
    """The settings with the network that pods have in a cluster, or will have a part of."""
    with contextlib.suppress(errors.NixletError):
        if finding.find(settings, layout) is not None:
            given = podnetwork.remembered(layout) or str(model.networks(",".join(settings.cluster_cidr), what="")[0])
            return dataclasses.replace(settings, pod_cidr=given)
    return settings


def _missing(error: errors.NixletError) -> str:
    raise error


def _cluster(settings: node_config.Settings, found: finding.Found) -> model.ClusterSettings:
    return mapping.cluster_settings(settings, found, kernel.IPTABLES)


async def _programs(found: finding.Found, layout: node_config.Layout) -> str:
    said = await versions.ask(found, layout)
    versions.check(said)
    return ", ".join(f"{name} {said[name] or 'of no version'}" for name in found.programs)


def _address(cluster: model.ClusterSettings) -> str:
    addresses = ", ".join(map(str, cluster.node_ips))
    return f"node {cluster.node_name} at {addresses}, API server at {cluster.server_url}"


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


async def _certificates(cluster: model.ClusterSettings) -> str:
    from nixlet.cluster import findings  # noqa: PLC0415 (X.509 takes its time)

    found = await asyncio.to_thread(findings.check, cluster, datetime.datetime.now(datetime.UTC))
    if all(each.state is findings.State.MISSING for each in found):
        return "they are made at the first start"
    bad = [each for each in found if each.state is not findings.State.VALID]
    if bad:
        what = "; ".join(f"{each.file}: {each.state}{f' ({each.detail})' if each.detail else ''}" for each in bad[:3])
        more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise machine.Worse(f"{what}{more}", "restart the node: what is not an authority's is made anew")
    ends = min(each.not_after for each in found if each.not_after is not None)
    return f"{len(found)} are valid; the first ends on {ends:%Y-%m-%d}"


def _ports(cluster: model.ClusterSettings, found: finding.Found, layout: node_config.Layout) -> str:
    """Whether the ports are free that a cluster needs; a node that runs has them."""
    holder = files.holder(layout.lock)
    if holder:
        return f"up to the node that runs (process {holder})"
    wanted = list(ports.wanted(cluster, found.programs))
    ports.check(wanted)
    return f"{len(wanted)} are free"


def _kubelet(settings: node_config.Settings, layout: node_config.Layout) -> str:
    return f"its directory is {preparing.kubelet_dir(settings, layout)}, its drop-ins go to {preparing.kubelet_config_dir(layout)}"
