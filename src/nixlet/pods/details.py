"""All that is known of a container: what CRI, containerd and its specification say, under names that last."""

import json
from collections.abc import Mapping
from typing import Any

from nixlet.containerd import cri
from nixlet.pods import criconfig, listing
from nixlet.rpc.gen import cri_pb2


async def describe(runtime: cri.RuntimeClient, container: str) -> Mapping[str, Any]:
    """A container, as ``nixlet inspect`` prints it.

    Raises:
        NotFoundError: It is not there (any more).
        NixletError: The runtime can't tell.
    """
    status, texts = await runtime.container_details(container)
    # What containerd has to add: its process, configuration and specification.
    info = json.loads(texts.get("info", "{}"))
    sandbox = await runtime.sandbox_status(info.get("sandboxID", ""))
    addresses = [sandbox.network.ip, *(each.ip for each in sandbox.network.additional_ips)]
    spec = info.get("runtimeSpec", {})
    mode = _mode(sandbox, spec)
    process = spec.get("process", {})
    config = info.get("config", {})
    user = process.get("user", {})
    return {
        "id": status.id,
        "name": status.metadata.name,
        "pod": status.labels.get(criconfig.POD_NAME, ""),
        "namespace": status.labels.get(criconfig.POD_NAMESPACE, ""),
        "sandbox": info.get("sandboxID", ""),
        "image": status.image.user_specified_image or status.image.image,
        "image_id": status.image_ref,
        "snapshotter": info.get("snapshotter", ""),
        "snapshot": info.get("snapshotKey", ""),
        "state": {
            "status": listing.state_of(status.state),
            "pid": info.get("pid", 0) if status.state == cri_pb2.CONTAINER_RUNNING else 0,
            "exit_code": status.exit_code if status.state == cri_pb2.CONTAINER_EXITED else None,
            "reason": status.reason,
            "message": status.message,
            "created": listing.moment(status.created_at),
            "started": listing.moment(status.started_at),
            "finished": listing.moment(status.finished_at),
        },
        "process": {
            "args": process.get("args", []),
            "env": process.get("env", []),
            "working_dir": process.get("cwd", ""),
            "user": f"{user.get('uid', 0)}:{user.get('gid', 0)}",
            "terminal": bool(process.get("terminal")),
            "stdin": bool(config.get("stdin")),
        },
        "read_only": bool(spec.get("root", {}).get("readonly")),
        "network": {
            "mode": mode,
            "addresses": [] if mode == "none" else [address for address in addresses if address],
            "ports": [str(port) for port in criconfig.ports_of(sandbox.annotations)],
        },
        "mounts": [
            {"host": mount.host_path, "container": mount.container_path, "read_only": mount.readonly}
            for mount in status.mounts
        ],
        "log": status.log_path,
        "labels": dict(sorted(status.labels.items())),
        "annotations": dict(sorted(status.annotations.items())),
    }


def _mode(sandbox: cri_pb2.PodSandboxStatus, spec: Mapping[str, Any]) -> str:
    if sandbox.linux.namespaces.options.network != cri_pb2.NODE:
        return "bridge"
    # Not by the pod's annotation, which anybody can make. A namespace without a path is made for the container alone.
    namespaces = spec.get("linux", {}).get("namespaces", [])
    alone = any(each["type"] == "network" and not each.get("path") for each in namespaces)
    return "none" if alone else "host"
