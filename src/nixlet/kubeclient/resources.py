"""Kinds of objects by where the API has them."""

import urllib.parse
from typing import NamedTuple

from nixlet import errors


class Resource(NamedTuple):
    """A kind of objects.

    Attributes:
        version: The API's group and version, as in ``apiVersion``.
        plural: What the kind is called in paths.
        namespaced: Its objects are in namespaces.
    """

    version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        """Where an object is, or all of them; without a namespace those of all namespaces.

        Raises:
            InvalidArgumentError: A name can't be in a path, or the kind has no namespaces, or an object has none.
        """
        if namespace and not self.namespaced:
            raise errors.InvalidArgumentError(f"{self.plural} are in no namespace")
        if name and self.namespaced and not namespace:
            raise errors.InvalidArgumentError(f"{self.plural} are in a namespace, and none was given")
        parts = ["/apis" if "/" in self.version else "/api", self.version]
        parts += ["namespaces", _segment(namespace)] if namespace else []
        parts += [self.plural]
        parts += [_segment(name)] if name else []
        parts += [subresource] if subresource else []
        return "/".join(parts)


def _segment(name: str) -> str:
    # Kubernetes: "path segment names".
    if name in {".", ".."} or "/" in name or "%" in name:
        raise errors.InvalidArgumentError(f"{name[:80]!r} can't be an object's name")
    return urllib.parse.quote(name, safe=":")


NAMESPACES = Resource("v1", "namespaces", namespaced=False)
NODES = Resource("v1", "nodes", namespaced=False)
PODS = Resource("v1", "pods")
SECRETS = Resource("v1", "secrets")
SERVICE_ACCOUNTS = Resource("v1", "serviceaccounts")
CONFIG_MAPS = Resource("v1", "configmaps")
SERVICES = Resource("v1", "services")
EVENTS = Resource("v1", "events")
DEPLOYMENTS = Resource("apps/v1", "deployments")
LEASES = Resource("coordination.k8s.io/v1", "leases")
CLUSTER_ROLES = Resource("rbac.authorization.k8s.io/v1", "clusterroles", namespaced=False)
CLUSTER_ROLE_BINDINGS = Resource("rbac.authorization.k8s.io/v1", "clusterrolebindings", namespaced=False)
ROLES = Resource("rbac.authorization.k8s.io/v1", "roles")
ROLE_BINDINGS = Resource("rbac.authorization.k8s.io/v1", "rolebindings")
RUNTIME_CLASSES = Resource("node.k8s.io/v1", "runtimeclasses", namespaced=False)
SIGNING_REQUESTS = Resource("certificates.k8s.io/v1", "certificatesigningrequests", namespaced=False)
