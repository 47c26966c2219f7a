"""What a cluster's programs find on the disk when they start: certificates, tokens, kubeconfig files, the kubelet's configuration."""

import contextlib
import datetime
import logging
import os

from nixlet import errors
from nixlet.cluster import certificates, encryption, kubeconfigs, kubelet, programs, tokens
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import ClusterSettings
from nixlet.host import files
from nixlet.node.cluster.preflight import made, mapping
from nixlet.node.settings import config as node_config
from nixlet.node.settings import kubeletfiles, trusted
from nixlet.pods import resolvconf

#: A configuration of a kubelet's is no larger (bytes).
_MAX_CONFIG = 1 << 20

_log = logging.getLogger("nixlet.cluster")


def kubelet_dir(settings: node_config.Settings) -> str:
    """The kubelet's own directory."""
    return node_config.kubelet_argument(settings, "root-dir") or settings.layout.node("kubelet")


def logs_dir(layout: Layout) -> str:
    """Where the programs' logs are."""
    return os.path.join(layout.agent, "logs")


def static_pods(layout: Layout) -> str:
    """The directory of the manifests whose pods the kubelet runs by itself."""
    return os.path.join(layout.agent, "pod-manifests")


def node_of(settings: node_config.Settings, cgroup_driver: str) -> programs.Node:
    """What the kubelet has to know of its node.

    Args:
        settings: The node's.
        cgroup_driver: The runtime's.
    """
    layout = settings.layout
    return programs.Node(
        runtime_socket=settings.container_runtime_endpoint or layout.containerd_socket,
        image_socket=settings.image_service_endpoint or layout.node_socket,
        cgroup_driver=cgroup_driver,
        resolv_conf=resolvconf.for_pods(settings.resolv_conf, layout.resolv_conf) or resolvconf.HOST,
        root_dir=kubelet_dir(settings),
        static_pods=static_pods(layout),
    )


def _check_kept(cluster: ClusterSettings) -> None:
    """Check that a cluster that is there has what can't be made anew: with other authorities and keys it would be another one.

    Raises:
        FailedPreconditionError: It hasn't.
    """
    places = cluster.layout
    known = made.remembered(places)
    if known is None:
        return
    kept = [*(places.tls(f"{name}.crt") for name in certificates.NAMES), places.tls(certificates.SERVICE_KEY)]
    for path in (*kept, *([places.cred(encryption.FILES[0])] if known.encrypted else [])):
        if not os.path.lexists(path):
            raise errors.FailedPreconditionError(
                f"{path} is missing, which the cluster in {cluster.data_dir} was made with",
                hint="bring it back from a backup: nodes, tokens, service accounts and encrypted secrets would be lost without;"
                f" or remove {made.memory(places)} to have a new one made",
            )


def prepare_server(settings: node_config.Settings, cluster: ClusterSettings) -> None:
    """Have all that the programs of a server need, its kubelet's part left out.

    Raises:
        FailedPreconditionError: The cluster was made with other networks, or lacks what it was made with.
        NixletError: What is there can't be used, or the file system refuses.
    """
    made.check_networks(cluster)
    layout = cluster.layout
    given, of_agents = mapping.given_tokens(settings)
    # (what they say is looked at before anything is made)
    kubeconfigs.mode(settings.write_kubeconfig_mode)
    kubeconfigs.group(settings.write_kubeconfig_group)
    _have_certificates(cluster)
    configs = {**kubeconfigs.of_server(cluster), **kubeconfigs.of_node(layout, cluster.server_url)}
    # What a start left that was killed while it wrote: keys of secrets, for instance.
    for directory in (layout.server, layout.cred(""), layout.agent):
        files.sweep(directory, [*map(os.path.basename, (*configs, made.memory(layout))), *encryption.FILES])
    encryption.ensure(cluster)
    path = layout.tls("server-ca.crt")
    with files.refusing(f"{path} can't be read"), open(path, "rb") as file:
        authority = file.read()
    tokens.keep(layout, authority, given=given, agent=of_agents)
    for directory in programs.directories(cluster):
        files.make_directory(os.path.dirname(directory))
        with files.refusing(f"can't make the directory {directory}"):
            files.own_directory(directory, 0o700)
    files.make_directory(logs_dir(layout), mode=0o700)
    for path, config in configs.items():
        kubeconfigs.write(path, config)
    path = _write_for_people(settings, cluster)
    if not settings.write_kubeconfig:
        # (elsewhere others may be writing)
        files.sweep(os.path.dirname(path), [os.path.basename(path)])
    _log.info("the administrator's kubeconfig is %s; the token for other nodes is in %s/token", path, layout.server)


def renew(settings: node_config.Settings, cluster: ClusterSettings) -> None:
    """Have the certificates of a server that runs made anew, those whose time it is, and what people have of them.

    Raises:
        NixletError: What is there can't be used, or the file system refuses.
    """
    _have_certificates(cluster)
    _write_for_people(settings, cluster)


def _have_certificates(cluster: ClusterSettings) -> None:
    # (also while the node runs: what is gone then would be another one's by the next start)
    _check_kept(cluster)
    for change in certificates.ensure(cluster, datetime.datetime.now(datetime.UTC)):
        _log.info("made %s: %s", change.file, change.reason)


def _write_for_people(settings: node_config.Settings, cluster: ClusterSettings) -> str:
    """Write the administrator's kubeconfig, which has its certificate in it; its path."""
    path = mapping.kubeconfig_path(settings)
    mode, group = kubeconfigs.mode(settings.write_kubeconfig_mode), kubeconfigs.group(settings.write_kubeconfig_group)
    kubeconfigs.write(path, kubeconfigs.for_people(cluster), mode=mode, group=group)
    return path


def prepare_agent(settings: node_config.Settings, cluster: ClusterSettings, node: programs.Node) -> None:
    """Have all that a kubelet needs beside its certificates.

    Raises:
        UsageError: The configuration that a person names can't be read.
        PermissionDeniedError: Somebody else can write it.
        NixletError: The file system refuses.
    """
    layout = cluster.layout
    directory, ours, copy = kubeletfiles.directory(layout), kubeletfiles.defaults(layout), kubeletfiles.named(layout)
    files.make_directory(directory, mode=0o700)
    for each, mode in ((node.root_dir, 0o750), (node.static_pods, 0o750), (logs_dir(layout), 0o700)):
        files.make_directory(each, mode=mode)
    files.sweep(directory, [*map(os.path.basename, (ours, copy))])
    files.write_atomically(ours, kubelet.configuration(cluster, node), mode=0o600)
    named = node_config.kubelet_argument(settings, "config")
    if named:
        files.write_atomically(copy, trusted.read(named, _MAX_CONFIG), mode=0o600)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(copy)
