"""What a cluster's API server has to know before it is of use to its nodes: who may reach kubelets, whose certificates are renewed, what flannels may.

A bootstrap token opens the port for joining, and nothing of the API server's. By Kubernetes' own way (its roles ``node-bootstrapper`` and
``nodeclient``) whoever has one gets a certificate for any node, those that are there included: no password of a node is asked for.

Kubernetes: "Kubelet authentication/authorization" and "TLS bootstrapping"; the roles are its own (RBAC bootstrap policy).
"""

import asyncio
import logging
import time
from collections.abc import Iterator

from nixlet import errors
from nixlet.cluster import subjects
from nixlet.kubeclient import resources
from nixlet.kubeclient.asynchronous import AsyncClient
from nixlet.kubeclient.client import Object

#: Seconds between two tries.
_PAUSE, _LONGEST_PAUSE = 0.2, 10.0

#: Seconds after which the same is said again.
_AGAIN = 300.0

_FLANNEL = "nixlet:flannel"

_SIGNING = "system:certificates.k8s.io:certificatesigningrequests"

_log = logging.getLogger("nixlet.cluster")


def wanted(*, flannel: bool) -> Iterator[tuple[resources.Resource, Object]]:
    """What there is to apply.

    Args:
        flannel: Nodes have a flannel.
    """
    if flannel:
        yield resources.CLUSTER_ROLES, _flannel_role()
    for each in bindings(flannel=flannel):
        yield resources.CLUSTER_ROLE_BINDINGS, each


def _flannel_role() -> Object:
    """What nodes may besides, for their flannels: see all nodes. Into its own one, where others find how it is reached, each may write as a node."""
    return {
        "apiVersion": resources.CLUSTER_ROLES.version,
        "kind": "ClusterRole",
        "metadata": {"name": _FLANNEL},
        "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]}],
    }


def bindings(*, flannel: bool) -> Iterator[Object]:
    """The bindings of roles.

    Args:
        flannel: Nodes have a flannel.
    """
    yield _binding("nixlet:kube-apiserver-to-kubelets", "system:kubelet-api-admin", "User", subjects.API_SERVER_USER)
    yield _binding("nixlet:approve-renewed-nodes", f"{_SIGNING}:selfnodeclient", "Group", subjects.NODES)
    if flannel:
        yield _binding(_FLANNEL, _FLANNEL, "Group", subjects.NODES)


def _binding(name: str, role: str, kind: str, subject: str) -> Object:
    group = resources.CLUSTER_ROLES.version.partition("/")[0]
    return {
        "apiVersion": resources.CLUSTER_ROLE_BINDINGS.version,
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": group, "kind": kind, "name": subject}],
    }


async def apply(client: AsyncClient, *, flannel: bool = False) -> None:
    """Have it all there, once; what fails is told, and tried again until it works.

    What is there already isn't written: a cluster may have a webhook that lets nobody write while its own pods aren't there, and those wait for
    this node.

    Args:
        client: Asks the API server, as its administrator.
        flannel: Nodes have a flannel.
    """
    for resource, each in wanted(flannel=flannel):
        name, pause = each["metadata"]["name"], _PAUSE
        told, told_at = "", 0.0
        while True:
            try:
                if not await _is_there(client, resource, name, each):
                    await client.apply(resource, name, each)
                break
            except errors.NixletError as error:
                now = time.monotonic()
                if error.message != told or now - told_at >= _AGAIN:
                    _log.warning("%s can't be applied yet: %s", name, error, extra={"hint": error.hint})
                    told, told_at = error.message, now
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)


async def _is_there(client: AsyncClient, resource: resources.Resource, name: str, each: Object) -> bool:
    """Whether an object is as it is wanted."""
    try:
        found = await client.get(resource, name)
    except errors.NotFoundError:
        return False
    return all(found.get(key) == value for key, value in each.items() if key != "metadata")
