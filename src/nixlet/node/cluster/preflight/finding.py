"""The programs that a cluster is made of: where they are, and what is missing. Nothing else of a cluster is imported here."""

import dataclasses
import logging
import os
from collections.abc import Mapping

from nixlet import errors
from nixlet.host import process
from nixlet.node.cluster.preflight import made
from nixlet.node.settings import config as node_config
from nixlet.node.settings import names

#: What the datastore may be.
KINE, ETCD, ELSEWHERE = made.KINE, made.ETCD, made.ELSEWHERE

#: What brings pods' packets to other nodes, by the name of its releases. (Its module's program is called as its CNI plugin is.)
FLANNEL = "flanneld"

#: Settings by which a person says that they want a cluster, where they differ from the default.
_ASKING = (
    "server", "kubeconfig", "kubernetes_bin_dir", "token", "token_file", "agent_token", "agent_token_file", "datastore_endpoint", "cluster_init", "secrets_encryption",
)  # fmt: skip

#: How to come by the programs, by name; all others are Kubernetes' own.
_HOW = {
    KINE: "kine is built from its Go module github.com/k3s-io/kine",
    ETCD: "etcd is in most distributions (Debian: apt install etcd-server)",
    FLANNEL: "flanneld is on github.com/flannel-io/flannel/releases, or built from its Go module github.com/flannel-io/flannel",
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
        flannel: A server's word on how flannel brings pods' packets to other nodes; "none": it doesn't. An agent's programs have one
            where there is one: what its server says holds.
    """

    programs: Mapping[str, str]
    datastore: str
    flannel: str = "none"


def find(settings: node_config.Settings) -> Found | None:
    """The programs of the cluster that a node with these settings is; None: it is a node alone.

    Raises:
        UnavailableError: A cluster is asked for, or is there, and programs are missing.
        FailedPreconditionError: There is a cluster, and its state is elsewhere than is said, or gone.
    """
    if settings.kubernetes == "no":
        return None
    if settings.kubernetes == node_config.KUBELET:
        return _kubelet_alone(settings)
    datastore = _datastore(settings)
    found = {name: program(name, settings) for name in _wanted(settings, datastore)}
    missing = [name for name, path in found.items() if path is None]
    if not missing:
        programs = {name: path for name, path in found.items() if path is not None}
        backend, flannel = _flannel(settings)
        return Found(programs | ({FLANNEL: flannel} if flannel else {}), datastore, backend)
    where = settings.kubernetes_bin_dir or "PATH"
    what = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not {'in' if settings.kubernetes_bin_dir else 'on'} {where}"
    if reason := _reason(settings):
        raise errors.UnavailableError(f"{reason}, and {what}", hint=_hint(missing))
    _log.info("the node is alone, without a Kubernetes cluster: %s", what)
    return None


def _kubelet_alone(settings: node_config.Settings) -> Found:
    """The program of a kubelet without a cluster."""
    for name in ("server", "kubeconfig", "disable_agent", "cluster_init", "datastore_endpoint"):
        if getattr(settings, name):
            raise errors.UsageError(
                f"--kubernetes kubelet has a kubelet without a cluster, and {names.flag(name)} is about a cluster",
                hint="leave one of them out",
            )
    if there := _trace(settings.layout):
        raise errors.FailedPreconditionError(
            f"there is a cluster in {settings.data_dir} ({there}), and a kubelet without it would end its pods",
            hint="--data-dir names another directory; or take the cluster's node away first: nixlet uninstall",
        )
    path = program("kubelet", settings)
    if path is None:
        where = f"in {settings.kubernetes_bin_dir}" if settings.kubernetes_bin_dir else "on PATH"
        raise errors.UnavailableError(
            f"--kubernetes kubelet asks for a kubelet, which is not {where}",
            hint=f"--kubernetes-bin-dir says where it is, and --kubernetes no does without; {_KUBERNETES}",
        )
    return Found({"kubelet": path}, ELSEWHERE)


def _trace(layout: node_config.Layout) -> str:
    """What says that a node is one of a cluster; empty: nothing does."""
    for path in (layout.database, made.memory(layout), layout.node("kubelet.kubeconfig")):
        if os.path.exists(path):
            return path
    return ""


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


def _flannel(settings: node_config.Settings) -> tuple[str, str]:
    """How flannel is to bring packets to other nodes, as far as it is this node's to say, and the program where it is to run here.

    Raises:
        UsageError: It is asked for where nixlet has no network of pods.
        UnavailableError: It is asked for, or has been at work, and isn't there.
    """
    said, path = settings.flannel_backend, program(FLANNEL, settings)
    if settings.kubeconfig or settings.container_runtime_endpoint:
        if said in node_config.FLANNEL_BACKENDS:
            whose = "cluster" if settings.kubeconfig else "containerd"
            raise errors.UsageError(
                f"--flannel-backend {said}: the network of pods is the affair of the {whose} that isn't nixlet's",
                hint="leave it out",
            )
        return "none", ""
    if settings.server:
        return "none", path or ""
    if said == "none":
        return "none", ""
    if path is None and not settings.disable_agent:
        reason = f"--flannel-backend {said} asks for flannel"
        if not said:
            if not os.path.exists(settings.layout.node("flannel.json")):
                return "none", ""
            reason = "pods of this cluster reach each other by flannel"
        raise missing_flannel(reason)
    if not said and path is None:
        return "none", ""
    return said or node_config.FLANNEL_BACKENDS[0], "" if settings.disable_agent else path or ""


def missing_flannel(reason: str) -> errors.UnavailableError:
    """What to say where it is needed."""
    return errors.UnavailableError(
        f"{reason}, and {FLANNEL} is neither in --kubernetes-bin-dir nor on PATH nor with the CNI plugins",
        hint=f"{_HOW[FLANNEL]}; or do without on the server: --flannel-backend none",
    )


def program(name: str, settings: node_config.Settings) -> str | None:
    """The absolute path of one of the programs; None: it isn't there."""
    directory = settings.kubernetes_bin_dir
    if directory:
        path = os.path.join(directory, name)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
        # What keeps the state is packaged apart from the others, and so is flannel.
        if name not in {KINE, ETCD, FLANNEL}:
            return None
    if name == FLANNEL:
        # (first where the plugins are that go with it)
        for each in (os.path.join(directory, name) for directory in settings.cni_bin_dirs):
            if os.access(each, os.X_OK) and not os.path.isdir(each):
                return each
    return process.find_program(name)


def _datastore(settings: node_config.Settings) -> str:
    with_kine, with_etcd = (program(name, settings) is not None for name in (KINE, ETCD))
    return made.chosen(settings, with_kine=with_kine, with_etcd=with_etcd)


def _reason(settings: node_config.Settings) -> str:
    """Why a node alone won't do; empty: it does."""
    if settings.kubernetes == "yes":
        return "--kubernetes yes asks for a cluster"
    asking = next((name for name in _ASKING if getattr(settings, name) != getattr(_DEFAULTS, name)), "")
    if asking:
        return f"{names.flag(asking)} asks for a cluster"
    if os.path.isdir(settings.layout.database) or os.path.exists(made.memory(settings.layout)):
        return f"there is a cluster in {settings.data_dir}"
    return ""


def _hint(missing: list[str]) -> str:
    how = [_HOW[name] for name in missing if name in _HOW]
    if any(name not in _HOW for name in missing):
        how.append(_KUBERNETES)
    return f"--kubernetes-bin-dir says where they are, and --kubernetes no does without; {'; '.join(how)}"
