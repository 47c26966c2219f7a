"""What a cluster was made with and goes on with: where its state is, and its networks. Remembered, so that a start can't change it unnoticed.

An empty datastore is no harmless mistake: to it no pod is known, and the kubelet ends all that run. With another network of services the API server's own
address isn't in its certificate any more, and pods look for names where nobody answers; with another network of pods the controllers don't start.
"""

import ipaddress
import os
from collections.abc import Iterable

import msgspec

from nixlet import errors
from nixlet.cluster.layout import Layout
from nixlet.cluster.settings import OWN_SQLITE, ClusterSettings, Network
from nixlet.encoding import unreadable
from nixlet.host import files
from nixlet.node.settings import config as node_config
from nixlet.node.settings import names

#: What the datastore may be: kine's database, an etcd of ours, or an etcd of somebody else's, for which nothing is started.
KINE, ETCD, ELSEWHERE = "kine", "etcd", ""

#: What is remembered of it: kine's own file, an etcd of ours, or whatever ``--datastore-endpoint`` named.
_SQLITE, _ETCD, _ENDPOINT = "sqlite", "etcd", "endpoint"


class Made(msgspec.Struct, frozen=True):
    """What is remembered.

    Attributes:
        state: Where its state is.
        cluster_cidr: The networks of its pods.
        service_cidr: Those of its services.
        encrypted: Its secrets are encrypted.
        recorded: Its datastore, which is elsewhere, says whose it is (``controlplane.record``).
    """

    state: str
    cluster_cidr: list[str]
    service_cidr: list[str]
    encrypted: bool = False
    recorded: bool = False


def _etcd(layout: Layout) -> str:
    # What etcd makes in its directory, which alone may be a place where a disk is to be mounted.
    return os.path.join(layout.database, "etcd", "member")


def _sqlite(layout: Layout) -> str:
    return os.path.join(layout.database, "state.db")


def memory(layout: Layout) -> str:
    """The file by which it is remembered."""
    return os.path.join(layout.server, "made.json")


def remember(settings: node_config.Settings, datastore: str, cluster: ClusterSettings) -> None:
    """Write down what a cluster is made with, as soon as it has a state.

    Raises:
        NixletError: The file system refuses, as in ``files.refused``.
    """
    state = _ENDPOINT if _is_named(settings) else _ETCD if datastore == ETCD else _SQLITE
    made = Made(
        state,
        [*map(str, cluster.cluster_cidrs)],
        [*map(str, cluster.service_cidrs)],
        cluster.secrets_encryption,
        recorded=state == _ENDPOINT,
    )
    files.write_atomically(memory(cluster.layout), msgspec.json.encode(made), mode=0o600)


def remembered(layout: Layout) -> Made | None:
    """What a cluster was made with; None: there was none yet, or of a version that didn't write it down.

    Raises:
        FailedPreconditionError: It can't be read.
    """
    path = memory(layout)
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Made)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise files.refused(f"{path} can't be read", error) from error
    except unreadable.JSON as error:
        raise errors.FailedPreconditionError(
            f"{path} doesn't say what the cluster was made with: {error}",
            hint="remove the file, where the settings are those that the cluster was made with",
        ) from error


def check_networks(cluster: ClusterSettings) -> None:
    """Check that a cluster's networks are those that it was made with. They may have grown.

    Raises:
        FailedPreconditionError: They are others.
    """
    made = remembered(cluster.layout)
    if made is None:
        return
    for name, before, now in (
        ("cluster_cidr", made.cluster_cidr, cluster.cluster_cidrs),
        ("service_cidr", made.service_cidr, cluster.service_cidrs),
    ):
        networks = [ipaddress.ip_network(each) for each in before]
        # (the first address of services is the API server's)
        moved = name == "service_cidr" and networks and networks[0][1] != now[0][1]
        if moved or not all(_is_within(each, now) for each in networks):
            raise errors.FailedPreconditionError(
                f"the cluster in {cluster.data_dir} was made with {names.flag(name)} {','.join(before)}, and what has addresses of it"
                f" would be lost with {','.join(map(str, now))}",
                hint=f"give {names.flag(name)} as before; a cluster with other networks is made in another --data-dir",
            )


def _is_within(network: Network, others: Iterable[Network]) -> bool:
    return any(
        network.version == other.version and other.prefixlen <= network.prefixlen and network.network_address in other
        for other in others
    )


def _is_named(settings: node_config.Settings) -> bool:
    """Whether the state is where a person says, and not in the data directory."""
    return settings.datastore_endpoint not in {"", OWN_SQLITE}


def _has_something(path: str) -> bool:
    """Whether a database has begun: an empty file is no state, but what is left of one.

    Raises:
        NixletError: It can't be looked at, as in ``files.refused``.
    """
    try:
        return os.path.getsize(path) > 0
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise files.refused(f"{path} can't be read", error) from error


def chosen(settings: node_config.Settings, *, with_kine: bool, with_etcd: bool) -> str:
    """What keeps the cluster's state: what is said, else what there is already, else kine, as k3s has it, or etcd where there is no kine.

    Args:
        settings: The node's.
        with_kine: That program is installed.
        with_etcd: That one is.

    Raises:
        FailedPreconditionError: There is a state already, and it is elsewhere than is said; or it is gone.
    """
    if settings.server or settings.kubeconfig:
        return ELSEWHERE
    layout = settings.layout
    there = ETCD if os.path.isdir(_etcd(layout)) else KINE if _has_something(_sqlite(layout)) else ""
    _check(settings, there)
    if _is_named(settings):
        return ELSEWHERE if settings.datastore_endpoint.partition("://")[0] in {"http", "https"} else KINE
    if settings.datastore_endpoint:
        return KINE
    if there:
        return there
    return ETCD if settings.cluster_init or (with_etcd and not with_kine) else KINE


def _check(settings: node_config.Settings, there: str) -> None:
    """Check that what is said is what there is."""
    layout = settings.layout
    if there:
        said = (
            "datastore_endpoint"
            if _is_named(settings) or (settings.datastore_endpoint and there == ETCD)
            else "cluster_init"
            if settings.cluster_init and there == KINE
            else ""
        )
        if said:
            path, flag = _etcd(layout) if there == ETCD else _sqlite(layout), names.flag(said)
            raise errors.FailedPreconditionError(
                f"the state of the cluster in {layout.data_dir} is in {path}, and with {flag} it would begin empty",
                hint=f"leave {flag} out; or move {path} away, where its state is not wanted any more",
            )
        return
    made = remembered(layout)
    known = "" if made is None else made.state
    if known == _ENDPOINT and not _is_named(settings):
        raise errors.FailedPreconditionError(
            f"the state of the cluster in {layout.data_dir} is at a datastore-endpoint, and none is given",
            hint=f"give it as before; or remove {memory(layout)} to begin an empty cluster",
        )
    # (who has moved it away says where it is by now)
    lost = {
        _ETCD: "" if settings.datastore_endpoint else _etcd(layout),
        _SQLITE: "" if settings.cluster_init or _is_named(settings) else _sqlite(layout),
    }.get(known)
    if lost:
        raise errors.FailedPreconditionError(
            f"{lost} is missing, or empty, in which the state of the cluster in {layout.data_dir} was",
            hint=f"bring back, or mount, what is to be there; or remove {memory(layout)} to begin an empty cluster",
        )
