"""Objects of Kubernetes that tests make."""

from collections.abc import Mapping, Sequence
from typing import Any

Object = dict[str, Any]


def pod(name: str, image: str, script: str, *, container: Mapping[str, Any] | None = None, **spec: Any) -> Object:
    """A pod that runs a script once, with more fields of its container and of itself."""
    main = {"name": "main", "image": image, "command": ["/bin/sh", "-c", script], **(container or {})}
    whole = {"restartPolicy": "Never", "containers": [main], "terminationGracePeriodSeconds": 1, **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"case": name}}, "spec": whole}


def mounted(name: str, volume: Mapping[str, Any], **more: Any) -> Object:
    """A pod's volume, and where its container has it: a directory of the volume's name."""
    return {
        "container": {"volumeMounts": [{"name": name, "mountPath": f"/{name}", **more}]},
        "volumes": [{"name": name, **volume}],
    }


def config_map(name: str, **data: str) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def deployment(name: str, replicas: int, container: Mapping[str, Any], **spec: Any) -> Object:
    """A deployment of pods of one container, labelled with its name; with more fields of the pods."""
    labels = {"app": name}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "main", **container}], **spec}}
    wanted = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": wanted}


def sleepers(name: str, image: str, replicas: int) -> Object:
    """A deployment of containers that do nothing."""
    container = {"image": image, "command": ["/bin/sleep", "100000"]}
    return deployment(name, replicas, container, terminationGracePeriodSeconds=0)


def service(name: str, ports: Sequence[Mapping[str, Any]], **spec: Any) -> Object:
    """A service before the pods of a deployment."""
    whole = {"selector": {"app": name}, "ports": list(ports), **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": whole}
