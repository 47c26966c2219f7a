"""The programs that a cluster is made of: where they are, and what is missing. Nothing else of a cluster is imported here."""

import dataclasses
import logging
import os
from collections.abc import Mapping

from nixlet import errors
from nixlet.host import process
from nixlet.node.settings import config as node_config
from nixlet.node.settings import names

#: What the datastore may be: kine's database, an etcd of ours, or an etcd of somebody else's, for which nothing is started.
KINE, ETCD, ELSEWHERE = "kine", "etcd", ""

#: Settings by which a person says that they want a cluster, where they differ from the default.
_ASKING = (
    "server", "kubeconfig", "kubernetes_bin_dir", "token", "token_file", "agent_token", "agent_token_file", "datastore_endpoint", "cluster_init", "secrets_encryption",
)  # fmt: skip

#: How to come by the programs, by name; all others are Kubernetes' own.
_HOW = {
    KINE: "kine is built from its Go module github.com/k3s-io/kine",
    ETCD: "etcd is in most distributions (Debian: apt install etcd-server)",
}
_KUBERNETES = (
    "Kubernetes' programs are on kubernetes.io/releases/download, or built from its Go module k8s.io/kubernetes"
)

_DEFAULTS = node_config.Settings()
_log = logging.getLogger("nixlet.cluster")


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A cluster's programs.

    Attributes:
        programs: Their absolute paths, by name.
        datastore: ``KINE``, ``ETCD`` or ``ELSEWHERE``.
    """

    programs: Mapping[str, str]
    datastore: str


def find(settings: node_config.Settings, layout: node_config.Layout) -> Found | None:
    """The programs of the cluster that a node with these settings is; None: it is a node alone.

    Raises:
        UnavailableError: A cluster is asked for, or is there, and programs are missing.
    """
    if settings.kubernetes == "no":
        return None
    datastore = _datastore(settings, layout)
    found = {name: program(name, settings) for name in _wanted(settings, datastore)}
    missing = [name for name, path in found.items() if path is None]
    if not missing:
        return Found({name: path for name, path in found.items() if path is not None}, datastore)
    where = settings.kubernetes_bin_dir or "PATH"
    what = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not {'in' if settings.kubernetes_bin_dir else 'on'} {where}"
    if reason := _reason(settings, layout):
        raise errors.UnavailableError(f"{reason}, and {what}", hint=_hint(missing))
    _log.info("the node is alone, without a Kubernetes cluster: %s", what)
    return None


def _wanted(settings: node_config.Settings, datastore: str) -> list[str]:
    disabled = {
        "kube-controller-manager": settings.disable_controller_manager,
        "kube-scheduler": settings.disable_scheduler,
        "kubelet": settings.disable_agent,
        "kube-proxy": settings.disable_agent or settings.disable_kube_proxy,
    }
    if settings.kubeconfig:
        # What else runs on its nodes such a cluster brings itself.
        return ["kubelet"]
    if settings.server:
        return [name for name in ("kubelet", "kube-proxy") if not disabled[name]]
    programs = [name for name, without in disabled.items() if not without]
    return [*([datastore] if datastore != ELSEWHERE else []), "kube-apiserver", *programs]


def program(name: str, settings: node_config.Settings) -> str | None:
    """The absolute path of one of the programs; None: it isn't there."""
    directory = settings.kubernetes_bin_dir
    if directory:
        path = os.path.join(directory, name)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
        # What keeps the state is packaged apart from the others.
        return process.find_program(name) if name in {KINE, ETCD} else None
    return process.find_program(name)


def _datastore(settings: node_config.Settings, layout: node_config.Layout) -> str:
    """What keeps the cluster's state: what is said, else what there is already, else kine, as k3s has it, or etcd where there is no kine."""
    endpoint = settings.datastore_endpoint
    if settings.server or settings.kubeconfig:
        return ELSEWHERE
    if endpoint:
        return ELSEWHERE if endpoint.partition("://")[0] in {"http", "https"} else KINE
    database = os.path.join(layout.data_dir, "server", "db")
    if settings.cluster_init or os.path.isdir(os.path.join(database, "etcd")):
        return ETCD
    if os.path.exists(os.path.join(database, "state.db")):
        return KINE
    return KINE if program(KINE, settings) is not None or program(ETCD, settings) is None else ETCD


def _reason(settings: node_config.Settings, layout: node_config.Layout) -> str:
    """Why a node alone won't do; empty: it does."""
    if settings.kubernetes == "yes":
        return "--kubernetes yes asks for a cluster"
    asking = next((name for name in _ASKING if getattr(settings, name) != getattr(_DEFAULTS, name)), "")
    if asking:
        return f"{names.flag(asking)} asks for a cluster"
    if os.path.isdir(os.path.join(layout.data_dir, "server", "db")):
        return f"there is a cluster in {layout.data_dir}"
    return ""


def _hint(missing: list[str]) -> str:
    how = [_HOW[name] for name in missing if name in _HOW]
    if any(name not in _HOW for name in missing):
        how.append(_KUBERNETES)
    return f"--kubernetes-bin-dir says where they are, and --kubernetes no does without; {'; '.join(how)}"
