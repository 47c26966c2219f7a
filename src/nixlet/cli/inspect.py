"""``nixlet inspect``: all that is known of containers."""

from nixlet.cli import grammar, options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from nixlet.cli.node import Node
    from nixlet.rpc.gen import cri_pb2


@grammar.verb(
    options.STATE_DIR,
    grammar.Argument("containers", several=True, completes="containers"),
)
@options.asynchronous
async def inspect(containers: tuple[str, ...], state_dir: str) -> None:
    """Print all that is known of CONTAINERS, as a JSON list."""
    from nixlet.cli import containers as module
    from nixlet.cli import node

    async with node.connected(state_dir) as connection:
        found = [await module.find(connection, wanted) for wanted in containers]
        options.print_json([await _describe(connection, each.id) for each in found])


async def _describe(connection: "Node", container: str) -> "dict[str, Any]":
    from nixlet.cli import containers as module
    from nixlet.pods import criconfig
    from nixlet.rpc.gen import cri_pb2

    status, info = await module.details(connection, container)
    sandbox = await connection.runtime.sandbox_status(info.get("sandboxID", ""))
    alone = criconfig.NO_NETWORK in sandbox.annotations
    addresses = [sandbox.network.ip, *(each.ip for each in sandbox.network.additional_ips)]
    spec = info.get("runtimeSpec", {})
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
            "status": cri_pb2.ContainerState.Name(status.state).removeprefix("CONTAINER_").lower(),
            "pid": info.get("pid", 0) if status.state == cri_pb2.CONTAINER_RUNNING else 0,
            "exit_code": status.exit_code if status.state == cri_pb2.CONTAINER_EXITED else None,
            "reason": status.reason,
            "message": status.message,
            "created": module.moment(status.created_at),
            "started": module.moment(status.started_at),
            "finished": module.moment(status.finished_at),
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
            "mode": "none" if alone else _mode(sandbox),
            "addresses": [] if alone else [address for address in addresses if address],
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


def _mode(sandbox: "cri_pb2.PodSandboxStatus") -> str:
    from nixlet.rpc.gen import cri_pb2

    return "host" if sandbox.linux.namespaces.options.network == cri_pb2.NODE else "bridge"
